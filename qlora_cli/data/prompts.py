"""Rows that ask something, with an answer or without: what a model is given to write one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qlora_cli.data.encode.encoder import Encoder
from qlora_cli.data.formats import (
    Alpaca,
    FormatConfig,
    Messages,
    PromptCompletion,
    ShareGpt,
    TemplateFormat,
    Text,
)
from qlora_cli.data.formats.fields import list_of
from qlora_cli.data.sources import BadRows, Source
from qlora_cli.errors import DataError
from qlora_cli.types import Conversation, Message, Prompt, Row

_NO_ANSWER = "[no answer]"
"""Stands where a format wants an answer and the row has none."""


@dataclass(frozen=True, slots=True)
class Question:
    """What a row asks."""

    prompt: Prompt
    reference: str | None
    """The answer that the row has."""


def read_questions(
    path: Path,
    encoder: Encoder,
    *,
    formats: Sequence[FormatConfig] = (),
    is_plain: bool = False,
    system: str | None = None,
) -> list[Question]:
    """What each row of a file asks.

    A row is read in one of `formats`, else by its columns: `messages`, `conversations`,
    `instruction`, `prompt`, or `text` (the lines of a text file).

    Args:
        is_plain: prompts are continued as they are, without chat template.
        system: system message of conversations that have none.

    Raises:
        DataError: no rows, or rows that ask nothing (all are counted).
    """
    bad = BadRows()
    questions = []
    for located in Source(path=str(path)).read(bad):
        try:
            row, reference = _read(located.row, formats, is_plain)
            messages = _with_system(row.messages, system)
            prompt = encoder.to_prompt(messages, row.tools)
        except DataError as error:
            bad.add(located.place, error)
        else:
            prompt = replace(
                prompt, text=_said(messages), place=located.place, reference=reference or ""
            )
            questions.append(Question(prompt, reference))
    if bad.count:
        raise DataError(bad.report(str(path)))
    if not questions:
        raise DataError(f"{path}: no rows")
    return questions


def is_verbatim(format: FormatConfig) -> bool:
    """Whether rows of this format are learnt without a chat template."""
    return isinstance(format, Text) or (isinstance(format, PromptCompletion) and not format.as_chat)


def _read(
    row: Row, formats: Sequence[FormatConfig], is_plain: bool
) -> tuple[Conversation, str | None]:
    """The conversation up to an answer that is due, and the answer that the row has."""
    problem = DataError(
        f"found {', '.join(map(repr, row)) or 'nothing'}; expected messages, conversations, "
        "instruction, prompt or text"
    )
    for format in [*formats, *_by_columns(row, is_plain)]:
        try:
            return _due(_whole(row, format))
        except DataError as error:
            problem = error
    raise problem


def _by_columns(row: Row, is_plain: bool) -> Iterator[FormatConfig]:
    if "messages" in row:
        yield Messages()
    elif "conversations" in row:
        yield ShareGpt()
    elif "instruction" in row:
        yield Alpaca()
    elif "prompt" in row:
        yield PromptCompletion(as_chat=not is_plain)
    elif "text" in row:
        yield PromptCompletion(prompt_field="text", as_chat=not is_plain)


def _whole(row: Row, format: FormatConfig) -> Conversation:
    """The row with an answer; `_NO_ANSWER` if it has none."""
    match format:
        case Messages() | ShareGpt():
            turns: list[Any] = [turn for _, turn in list_of(row, format.field)]
            last = turns[-1] if turns else None
            session, said, answers = _SHAREGPT if isinstance(format, ShareGpt) else _OPENAI
            is_answer = isinstance(last, dict) and last.get(session) in ("assistant", "gpt")
            if not is_answer:
                turns.append({session: answers, said: _NO_ANSWER})
            return format.to_conversation({**row, format.field: turns})
        case Alpaca():
            return format.to_conversation({**row, "output": row.get("output") or _NO_ANSWER})
        case PromptCompletion():
            is_list = isinstance(row.get(format.prompt_field), list)
            none = [{"role": "assistant", "content": _NO_ANSWER}] if is_list else _NO_ANSWER
            completion = row.get(format.completion_field) or none
            return format.to_conversation({**row, format.completion_field: completion})
        case TemplateFormat():
            try:
                return format.to_conversation(row)
            except DataError:
                unanswered = format.model_copy(update={"assistant": _NO_ANSWER})
                return unanswered.to_conversation(row)
        case Text():
            [piece] = format.to_conversation(row).messages
            return Conversation([replace(piece, train=False), Message("text", _NO_ANSWER, True)])
        case _:
            raise DataError("preferences ask two things at once")


_OPENAI = ("role", "content", "assistant")
_SHAREGPT = ("from", "value", "gpt")


def _due(row: Conversation) -> tuple[Conversation, str | None]:
    *before, last = row.messages
    reference = None if last.content == _NO_ANSWER else last.content
    messages = [*(replace(message, train=False) for message in before), replace(last, train=True)]
    return replace(row, messages=messages), reference


def _with_system(messages: list[Message], system: str | None) -> list[Message]:
    if system is None or messages[0].role in ("system", "text"):
        return messages
    return [Message("system", system, train=False), *messages]


def _said(messages: list[Message]) -> str:
    """The last thing that was said before the answer, for whoever reads the results."""
    return messages[-2].content
