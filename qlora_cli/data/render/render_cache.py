"""Render each row once: rows of one shape share the search for their supervised spans.

The shape of a conversation is everything that a template may look at: roles, which messages have
reasoning or calls, the tools, white space around contents. A skeleton of that shape, in which
unique words stand for the contents, is rendered with every check. Its text, cut at the words, is a
pattern; the text of each conversation of that shape has to match it to the end.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from qlora_cli.data.render.answer_spans import AnswerSpan, RowAdditions
from qlora_cli.types import Conversation, Message, ToolCall

MAX_SHAPES = 4096
"""Shapes that are remembered. In data with more shapes, few rows share one."""

_WORD = re.compile(r"Qz(\d{1,9})zQ|c(\d{8})")


_Frame = tuple[str, str, int | None]


def _filled(frame: _Frame) -> str:
    before, after, number = frame
    return before if number is None else f"{before}Qz{number}zQ{after}"


class Skeleton:
    """A conversation with unique words in place of its contents."""

    def __init__(self, conversation: Conversation) -> None:
        self.values: list[str] = []
        """The contents that the words replace, in order, without white space around them."""
        self._ids: dict[str, str] = {}
        self._given = conversation
        # This runs for every row, so messages with nothing but content are only noted.
        self._turns = [
            self._message(message)
            if message.reasoning or message.tool_calls or message.name or message.tool_call_id
            else (message.role, message.train, self._frame(message.content))
            for message in conversation.messages
        ]
        tools = conversation.tools
        self.shape = repr((self._turns, tools))
        """Equal for conversations of the same shape."""

    @property
    def conversation(self) -> Conversation:
        """The conversation with the words."""
        messages = [
            turn if isinstance(turn, Message) else Message(turn[0], _filled(turn[2]), turn[1])
            for turn in self._turns
        ]
        return replace(self._given, messages=messages, place="", rejected=None)

    def _message(self, message: Message) -> Message:
        return replace(
            message,
            content=self._text(message.content),
            reasoning=message.reasoning and self._text(message.reasoning),
            tool_calls=tuple(
                ToolCall(call.name, self._arguments(call.arguments), self._id(call.id))
                for call in message.tool_calls
            ),
            tool_call_id=self._id(message.tool_call_id),
        )

    def _frame(self, text: str) -> _Frame:
        """Return the white space around a text and the number of its word (None if empty)."""
        core = text.strip()
        if not core:
            return text, "", None
        self.values.append(core)
        if len(core) == len(text):
            return "", "", len(self.values) - 1
        start = text.index(core)
        return text[:start], text[start + len(core) :], len(self.values) - 1

    def _text(self, text: str) -> str:
        return _filled(self._frame(text))

    def _arguments(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: self._arguments(entry) for key, entry in value.items()}
        if isinstance(value, list):
            return [self._arguments(entry) for entry in value]
        return self._text(value) if isinstance(value, str) else value

    def _id(self, value: str | None) -> str | None:
        # Nine letters and digits, as Mistral's templates require.
        if value is None:
            return None
        if value not in self._ids:
            self.values.append(value)
            self._ids[value] = f"c{len(self.values) - 1:08}"
        return self._ids[value]


@dataclass(frozen=True, slots=True)
class PatternMatch:
    """The places of a pattern's pieces in a text."""

    starts: list[int]
    contents: list[tuple[int, int]]
    """The spans of the pieces that came from the data."""


class TextPattern:
    """The text of a skeleton, cut at its words."""

    def __init__(
        self, text: str, answers: list[AnswerSpan], additions: RowAdditions, *, num_words: int
    ) -> None:
        self.additions = additions
        self._answers = answers
        self._pieces: list[str | int] = []
        self._starts: list[int] = []
        at = 0
        for word in _WORD.finditer(text):
            number = int(word[1] or word[2])
            if number >= num_words:
                continue  # tools hold texts of their own
            self._add(text[at : word.start()], at)
            self._add(number, word.start())
            at = word.end()
        self._add(text[at:], at)

    def _add(self, piece: str | int, start: int) -> None:
        if piece != "":
            self._pieces.append(piece)
            self._starts.append(start)

    def match(self, text: str, values: list[str]) -> PatternMatch | None:
        """Match a text in which the values replace the words; None if it does not match."""
        at, starts, contents = 0, [], []
        for piece in self._pieces:
            starts.append(at)
            if isinstance(piece, str):
                if not text.startswith(piece, at):
                    return None
                at += len(piece)
                continue
            value = values[piece]
            if not text.startswith(value, at):
                value = json.dumps(value, ensure_ascii=False)[1:-1]
            if not text.startswith(value, at):
                return None
            contents.append((at, at + len(value)))
            at += len(value)
        return PatternMatch([*starts, at], contents) if at == len(text) else None

    def answers(self, match: PatternMatch) -> list[AnswerSpan]:
        """Return the supervised spans of a text that matches."""

        def shifted(place: int) -> int:
            piece = bisect_right(self._starts, place) - 1
            return match.starts[piece] + place - self._starts[piece]

        def end(place: int) -> int:
            # Take this place as the end of a piece, although it is the beginning of the next too.
            piece = bisect_right(self._starts, place - 1) - 1
            inside = isinstance(self._pieces[piece], str)
            return shifted(place - 1) + 1 if inside else match.starts[piece + 1]

        return [
            AnswerSpan(shifted(answer.start), end(answer.end), end(answer.stop))
            for answer in self._answers
        ]


T = TypeVar("T")


class ShapeCache(dict[str, T]):
    """Values by shape; emptied when it is full."""

    def __setitem__(self, shape: str, value: T) -> None:
        if len(self) == MAX_SHAPES:
            self.clear()
        super().__setitem__(shape, value)
