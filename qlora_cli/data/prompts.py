"""Read prompts from rows with or without an answer."""

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
"""Stand-in for the answer that a format requires and the row lacks."""


@dataclass(frozen=True, slots=True)
class Question:
    """The prompt of a row, and its answer if it has one."""

    prompt: Prompt
    reference: str | None
    """The answer in the row; None if it has none."""


def read_questions(
    path: Path,
    encoder: Encoder,
    *,
    formats: Sequence[FormatConfig] = (),
    is_plain: bool = False,
    system: str | None = None,
) -> list[Question]:
    """Read a question from each row of a file.

    A row is read in one of `formats`, else by its columns: `messages`, `conversations`,
    `instruction`, `prompt`, or `text` (the lines of a text file).

    Args:
        is_plain: continue prompts as they are, without a chat template.
        system: system message for conversations that have none.

    Raises:
        DataError: there are no rows, or rows without a prompt (all are counted).
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
                prompt, text=_last_message(messages), place=located.place, reference=reference or ""
            )
            questions.append(Question(prompt, reference))
    if bad.count:
        raise DataError(bad.report(str(path)))
    if not questions:
        raise DataError(f"{path}: no rows")
    return questions


def _read(
    row: Row, formats: Sequence[FormatConfig], is_plain: bool
) -> tuple[Conversation, str | None]:
    """Return the conversation that ends in the answer to write, and the row's own answer."""
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
    """Return the conversation of a row; its answer is `_NO_ANSWER` if the row has none."""
    match format:
        case Messages() | ShareGpt():
            turns: list[Any] = [turn for _, turn in list_of(row, format.field)]
            last = turns[-1] if turns else None
            role_key, text_key, assistant = _SHAREGPT if isinstance(format, ShareGpt) else _OPENAI
            is_answer = isinstance(last, dict) and last.get(role_key) in ("assistant", "gpt")
            if not is_answer:
                turns.append({role_key: assistant, text_key: _NO_ANSWER})
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
            raise DataError("a preference row has two answers; give rows with one")


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


def _last_message(messages: list[Message]) -> str:
    """Return the last message before the answer, to show with the results."""
    return messages[-2].content
