"""Formats for rows whose columns are texts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar, Literal, Self

from pydantic import model_validator

from qlora_cli.common.config import Config
from qlora_cli.data.formats.fields import (
    as_list,
    as_text,
    is_given,
    optional_text,
    parsed,
    shown,
    text_of,
)
from qlora_cli.data.formats.turns import check_order, messages_of, read_tools
from qlora_cli.errors import DataError
from qlora_cli.types import Conversation, Message, Row, RowKind


class Alpaca(Config):
    """`instruction`, optional `input`, `output`; `system` and `history` where the row has them.

    `history` is a list of pairs: a request and its answer. `tools` lists the functions that the
    assistant may call.
    """

    example: ClassVar[Row] = {
        "instruction": "Name the capital of the country.",
        "input": "France",
        "output": "Paris.",
    }

    rows: ClassVar[RowKind] = "answers"
    type: Literal["alpaca"] = "alpaca"

    def to_conversation(self, row: Row) -> Conversation:
        """Make the turns of the history, a user turn (instruction, blank line, input), the answer.

        All answers are trained on.
        """
        request, system = text_of(row, "instruction"), optional_text(row, "system")
        if row.get("input"):
            request = f"{request}\n\n{text_of(row, 'input')}"
        pairs = [*_history(row), (request, text_of(row, "output"))]
        messages = [] if system is None else [Message("system", system, train=False)]
        for question, answer in pairs:
            messages.append(Message("user", question, train=False))
            messages.append(Message("assistant", answer, train=True))
        return Conversation(messages, tools=read_tools(row))


class PromptCompletion(Config):
    """A prompt and the completion to train on: each a text, a message or a list of messages
    (OpenAI or ShareGPT). With `as_chat`, the column `tools` is read too."""

    example: ClassVar[Row] = {"prompt": "The capital of France is", "completion": " Paris."}

    rows: ClassVar[RowKind] = "answers"
    type: Literal["prompt_completion"] = "prompt_completion"
    prompt_field: str = "prompt"
    """Column that holds the prompt."""
    completion_field: str = "completion"
    """Column that holds the completion."""
    as_chat: bool = True
    """Put both through the chat template, as a user and an assistant turn; if false, verbatim."""
    system: str | None = None
    """System message before each prompt (requires `as_chat`)."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.system is not None and not self.as_chat:
            raise ValueError(
                f"system ({self.system!r}) needs as_chat, which is false: verbatim text has no "
                "system message"
            )
        if self.prompt_field == self.completion_field:
            raise ValueError(
                f"prompt_field and completion_field are the same column ({self.prompt_field!r})"
            )
        return self

    def to_conversation(self, row: Row) -> Conversation:
        """Make a user and an assistant turn, or two verbatim pieces. The second is trained on."""
        for field in (self.prompt_field, self.completion_field):
            if isinstance(row.get(field), list | Mapping):
                return self._from_messages(row, field)
        prompt, completion = text_of(row, self.prompt_field), text_of(row, self.completion_field)
        if not self.as_chat:
            pieces = [Message("text", prompt, train=False), Message("text", completion, train=True)]
            return Conversation(pieces)
        return Conversation(
            [
                *self._system(),
                Message("user", prompt, train=False),
                Message("assistant", completion, train=True),
            ],
            tools=read_tools(row),
        )

    def _from_messages(self, row: Row, field: str) -> Conversation:
        if not self.as_chat:
            raise DataError(
                f"field '{field}': got {shown(row[field])}, and as_chat is false: verbatim text "
                "has no messages"
            )
        prompt = messages_of(row, self.prompt_field, "user")
        completion = messages_of(row, self.completion_field, "assistant")
        check_order(completion, self.completion_field)
        # Only the completion is trained on, whatever answers the prompt contains.
        messages = [*self._system(), *(replace(m, train=False) for m in prompt), *completion]
        place = f"{self.prompt_field} + {self.completion_field}"
        return Conversation(check_order(messages, place), tools=read_tools(row))

    def _system(self) -> list[Message]:
        return [] if self.system is None else [Message("system", self.system, train=False)]


class Text(Config):
    """Plain text, all of it trained on, with the end-of-text token after each row."""

    example: ClassVar[Row] = {"text": "Paris is the capital of France."}

    rows: ClassVar[RowKind] = "answers"
    type: Literal["text"] = "text"
    field: str = "text"
    """Column that holds the text (a text file has one row per line, in the column `text`)."""

    def to_conversation(self, row: Row) -> Conversation:
        """Make one verbatim piece."""
        return Conversation([Message("text", text_of(row, self.field), train=True)])


def _history(row: Row) -> list[tuple[str, str]]:
    if not is_given(row, "history"):
        return []
    expected = "a list of pairs: a request and its answer"
    pairs = []
    for where, pair in as_list(parsed(row["history"], "history"), "history", expected):
        if not isinstance(pair, list) or len(pair) != 2:
            raise DataError(f"field '{where}': got {shown(pair)}, expected a pair of texts")
        pairs.append((as_text(pair[0], f"{where}[0]"), as_text(pair[1], f"{where}[1]")))
    return pairs
