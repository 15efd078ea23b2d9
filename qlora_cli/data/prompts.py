"""Read prompts from rows with or without an answer, and from typed requests."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

from pydantic import ValidationError

from qlora_cli.data.encode.encoder import Encoder
from qlora_cli.data.formats import (
    Alpaca,
    Feedback,
    FormatConfig,
    Labelled,
    Messages,
    Preference,
    PromptCompletion,
    ShareGpt,
    TemplateFormat,
    Text,
)
from qlora_cli.data.formats.answers import truth_of
from qlora_cli.data.formats.fields import is_given, list_of, shown
from qlora_cli.data.sources import BadRows, Source
from qlora_cli.errors import DataError
from qlora_cli.types import Conversation, Message, Prompt, Row

log = logging.getLogger("qlora")

T = TypeVar("T")

_TABLES = (
    'a csv file is delimited by commas: put a field that contains one in quotation marks ("a, b"), '
    "or name another delimiter (--delimiter ';'); a tsv file is delimited by tabs; --columns names "
    "the columns of a table without a header; lines of text without columns can be a .txt file"
)
_NO_TOOLS = (
    "the training rows declare tools, and this prompt has none, so the answer may differ from "
    "those of training; qlora generate (and generate in Python) takes rows with a column tools"
)
_NO_ANSWER = "[no answer]"
"""Stand-in for the answer that a format requires and the row lacks."""


@dataclass(frozen=True, slots=True)
class Question:
    """The prompt of a row, and its answer if it has one."""

    prompt: Prompt
    reference: str | None
    """The answer in the row, as the model would generate it; None if it has none."""


class PromptReader:
    """Turn rows and typed requests into prompts, in the form of the training rows.

    A row is read in one of `formats`, else by its columns: `messages`, `conversations`,
    `instruction`, `prompt`, or `text` (the lines of a text file). A `prompt` or `text` is put into
    the recipe's template if that uses a single column.

    Args:
        formats: data formats that the model was trained on.
        is_plain: continue prompts as they are, without a chat template.
        system: system message for conversations that have none, in place of the recipe's; None
            takes the recipe's.
        expects_tools: all training rows declared tools; warn of a prompt without them.
    """

    def __init__(
        self,
        formats: Sequence[FormatConfig] = (),
        *,
        is_plain: bool = False,
        system: str | None = None,
        expects_tools: bool = False,
    ) -> None:
        if system is not None:
            formats = [_without_system(format) for format in formats]
        self._formats = formats
        self._is_plain = is_plain
        self._system = system
        self._is_warned = False
        self._expects_tools = expects_tools

    def question(self, row: Row, encoder: Encoder) -> Question:
        """Encode the prompt of a row.

        Raises:
            DataError: the row has no prompt, the chat template refuses, or it does not show how the
                model would write the row's answer.
        """
        conversation, answer = self.read(row)
        messages, tools = conversation.messages, conversation.tools
        input_ids = encoder.encode_prompt(messages, tools)
        reference = None if answer is None else encoder.reference(messages, tools)
        lead = encoder.lead(messages[-1])
        prompt = Prompt(input_ids, reference or "", messages[-2].content, lead=lead)
        return Question(prompt, reference)

    def read(self, row: Row) -> tuple[Conversation, str | None]:
        """Return the conversation that ends in the answer to write, and the row's own answer.

        The answer is its content: empty if it only calls tools, None if the row has none.

        Raises:
            DataError: the row has no prompt, or tools that the prompt would leave out.
        """
        conversation, reference = self._read(row)
        if self._expects_tools and conversation.tools is None:
            self._expects_tools = False  # once is enough
            log.warning("%s", _NO_TOOLS)
        return conversation, reference

    def _read(self, row: Row) -> tuple[Conversation, str | None]:
        problem = DataError(
            f"found {', '.join(map(repr, row)) or 'nothing'}; expected messages, conversations, "
            "instruction, prompt or text"
        )
        for format in self._formats:
            if _ignores_request(format, row):
                continue
            try:
                conversation, reference = _due(_whole(row, format))
                _check_tools(row, format, conversation)
            except DataError as error:
                problem = error
            else:
                return _with_system(conversation, self._system), reference
        for format in _by_columns(row, self._is_plain):
            try:
                conversation, reference = _due(_whole(row, format))
                _check_tools(row, format, conversation)
            except DataError as error:
                problem = error
            else:
                if isinstance(format, PromptCompletion):
                    conversation = self._filled(conversation, row[format.prompt_field])
                system = self._recipe_system() if self._system is None else self._system
                return _with_system(conversation, system), reference
        raise problem

    def conversation(self, typed: Sequence[Message]) -> list[Message]:
        """Put each typed user message of a chat into the form of a training prompt.

        The system message is that of the first one.

        Raises:
            DataError: a message is empty.
        """
        turns: list[Message] = []
        for message in typed:
            if message.role != "user":
                turns.append(message)
                continue
            *before, request = self.read({"prompt": message.content})[0].messages[:-1]
            turns += [request] if turns else [*before, request]
        return turns

    def _filled(self, conversation: Conversation, text: Any) -> Conversation:
        """Put a request into the recipe's template."""
        templates = [f for f in self._formats if isinstance(f, TemplateFormat)]
        if self._is_plain or not templates or not isinstance(text, str):
            return conversation
        template = templates[0]
        columns = template.prompt_columns
        if len(columns) == 1 and all(format == template for format in self._formats):
            filled, _ = _due(_whole({columns[0]: text}, template))
            return replace(
                conversation, messages=[*filled.messages[:-1], conversation.messages[-1]]
            )
        if not self._is_warned:
            self._is_warned = True
            log.warning("%s", _unfilled(columns, len(self._formats)))
        return conversation

    def _recipe_system(self) -> str | None:
        """Return the system message of the recipe, if it names one that needs no columns."""
        for format in self._formats:
            if isinstance(format, PromptCompletion):
                return format.system
            if isinstance(format, TemplateFormat):
                return format.fixed_system()
        return None


def _ignores_request(format: FormatConfig, row: Row) -> bool:
    """Return whether a row is a single request that the format's prompt does not contain."""
    is_fixed = isinstance(format, TemplateFormat) and not format.prompt_columns
    return is_fixed and row.keys() == {"prompt"}


def _check_tools(row: Row, format: object, conversation: Conversation) -> None:
    """Raise DataError if a prompt leaves out the tools of its row."""
    if conversation.tools is not None or not is_given(row, "tools"):
        return
    if isinstance(format, TemplateFormat) and "tools" in format.prompt_columns:
        return
    raise DataError(
        f"field 'tools': got {shown(row['tools'])}, and the format of this prompt has no place for "
        "tools; give the row as messages, or without tools"
    )


def _without_system(format: FormatConfig) -> FormatConfig:
    if isinstance(format, PromptCompletion | TemplateFormat):
        return format.model_copy(update={"system": None})
    return format


def _unfilled(columns: list[str], num_formats: int) -> str:
    reason = (
        f"the recipe's template uses {len(columns)} columns ({', '.join(columns) or 'none'})"
        if num_formats == 1
        else f"the recipe has {num_formats} sources, and they do not share one template"
    )
    return (
        f"{reason}, so a single text is sent as typed, without the template; give rows with the "
        "columns of the recipe to get the prompts of training"
    )


def prompt_source(path: str, *, delimiter: str | None, columns: list[str] | None) -> Source:
    """Return a file of prompts as a source.

    Args:
        delimiter: that of a table; None takes the default of its kind.
        columns: the column names of a table without a header.

    Raises:
        DataError: the delimiter or the columns cannot be used.
    """
    try:
        return Source(path=path, delimiter=delimiter, columns=columns)
    except ValidationError as error:
        reasons = "; ".join(one["msg"].removeprefix("Value error, ") for one in error.errors())
        raise DataError(f"--delimiter or --columns: {reasons}") from error


def check_questions(source: Source, reader: PromptReader) -> None:
    """Check that each row of a source has a prompt. This takes no tokenizer and no model.

    Raises:
        DataError: as `read_questions`.
    """
    for _ in read_each(source, reader.read):
        pass


def read_questions(source: Source, encoder: Encoder, reader: PromptReader) -> list[Question]:
    """Read a question from each row of a source.

    Raises:
        DataError: there are no rows, or rows without a prompt (all are counted).
    """
    return [
        replace(question, prompt=replace(question.prompt, place=place))
        for place, question in read_each(source, lambda row: reader.question(row, encoder))
    ]


def read_each(source: Source, read: Callable[[Row], T]) -> Iterator[tuple[str, T]]:
    """Yield each row of a source as `read` returns it, with its place.

    Raises:
        DataError: at the end, if there are no rows, or bad rows.
    """
    bad, is_empty = BadRows(), True
    try:
        for located in source.read(bad):
            try:
                found = read(located.row)
            except DataError as error:
                bad.add(located.place, error)
            else:
                is_empty = False
                yield located.place, found
    except DataError as error:
        # A file of prompts has no settings in the recipe.
        is_setting = error.hint is not None and "data.train." in error.hint
        raise DataError(str(error), hint=_TABLES if is_setting else error.hint) from error
    if bad.count:
        raise DataError(bad.report(source.path), hint=_TABLES if bad.has_wrong_fields else None)
    if is_empty:
        raise DataError(f"{source.path}: no rows")


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


class _Format(Protocol):
    """A data format: one of those matched below, or a new one, whose rows need an answer."""

    def to_conversation(self, row: Row) -> Conversation: ...


def _whole(row: Row, format: _Format) -> Conversation:
    """Return the conversation of a row; its answer is `_NO_ANSWER` if the row has none."""
    match format:
        case Messages() | ShareGpt():
            turns: list[Any] = [turn for _, turn in list_of(row, format.field)]
            last = turns[-1] if turns else None
            role_key, text_key, assistant = _SHAREGPT if isinstance(format, ShareGpt) else _OPENAI
            is_answer = isinstance(last, dict) and last.get(role_key) in _ANSWERS
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
        case Preference():
            answers = {format.chosen_field: _NO_ANSWER, format.rejected_field: _NO_ANSWER}
            return replace(format.to_conversation(_filled_in(row, answers)), rejected=None)
        case Feedback():
            return _judged(row, format)
        case Labelled():
            raise DataError(
                "a labelled row has a label instead of an answer; give rows with a prompt"
            )
        case _:
            return format.to_conversation(row)


def _judged(row: Row, format: Feedback) -> Conversation:
    """Return the conversation of a row of feedback. A bad answer is not what it should end in."""
    is_bad = truth_of(row, format.label_field) is False
    prompt = format.prompt_field or "prompt"
    answers = {format.completion_field: _NO_ANSWER} if row.get(prompt) is not None else {}
    labelled = {**_filled_in(row, answers), format.label_field: True}
    found = replace(format.to_conversation(labelled), label=None)
    if is_bad:
        *before, last = found.messages
        return replace(found, messages=[*before, replace(last, content=_NO_ANSWER)])
    return found


def _filled_in(row: Row, answers: Row) -> Row:
    """Return a row with answers in the columns that are missing or null."""
    return {**answers, **{name: value for name, value in row.items() if value is not None}}


_ANSWERS = ("assistant", "gpt", "function_call")
_OPENAI = ("role", "content", "assistant")
_SHAREGPT = ("from", "value", "gpt")


def _due(row: Conversation) -> tuple[Conversation, str | None]:
    *before, last = row.messages
    if not before:
        raise DataError("the row has no prompt: nothing precedes its answer")
    reference = None if last.content == _NO_ANSWER else last.content
    messages = [*(replace(message, train=False) for message in before), replace(last, train=True)]
    return replace(row, messages=messages), reference


def _with_system(conversation: Conversation, system: str | None) -> Conversation:
    messages = conversation.messages
    if system is None or messages[0].role in ("system", "text"):
        return conversation
    return replace(conversation, messages=[Message("system", system, train=False), *messages])
