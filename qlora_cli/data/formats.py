"""From a row of a data source to messages. To add a format: one class, and its name in the union.

A row that does not fit raises DataError naming the field; the caller adds the file and line.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from qlora_cli.errors import DataError
from qlora_cli.part import Part
from qlora_cli.types import Conversation, Message, Role, Row

_ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}
_SHAREGPT_ROLES: dict[str, Role] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}
# A system prompt may be empty on purpose (some templates put in one of their own otherwise), and
# so may the answer of a tool.
_MAY_BE_EMPTY: tuple[Role, ...] = ("system", "tool")


class Messages(Part):
    """Conversations in the OpenAI manner: `{"messages": [{"role": ..., "content": ...}, ...]}`."""

    example: ClassVar[Row] = {
        "messages": [
            {"role": "system", "content": "Answer in one word."},
            {"role": "user", "content": "The capital of France?"},
            {"role": "assistant", "content": "Paris."},
        ]
    }

    type: Literal["messages"] = "messages"
    field: str = "messages"
    """Column that holds the list of messages."""

    def to_conversation(self, row: Row) -> Conversation:
        """The messages of a row; every assistant turn is learnt."""
        _refuse(row, "tools")
        messages = []
        for where, turn in _turns(row, self.field):
            # To leave these out would silently change what is learnt.
            _refuse(turn, "tool_calls", "function_call", "reasoning_content", "train", where=where)
            messages.append(_message(turn, where, "role", "content", _ROLES))
        return Conversation(_learnable(messages, self.field))


class ShareGpt(Part):
    """Conversations as `{"conversations": [{"from": "human" | "gpt" | ..., "value": ...}]}`."""

    example: ClassVar[Row] = {
        "conversations": [
            {"from": "human", "value": "The capital of France?"},
            {"from": "gpt", "value": "Paris."},
            {"from": "human", "value": "And of Spain?"},
            {"from": "gpt", "value": "Madrid."},
        ]
    }

    type: Literal["sharegpt"] = "sharegpt"
    field: str = "conversations"
    """Column that holds the list of turns."""

    def to_conversation(self, row: Row) -> Conversation:
        """The messages of a row; every turn from `gpt` or `assistant` is learnt."""
        _refuse(row, "tools", "system")
        turns = _turns(row, self.field)
        messages = [_message(turn, at, "from", "value", _SHAREGPT_ROLES) for at, turn in turns]
        return Conversation(_learnable(messages, self.field))


class Alpaca(Part):
    """`instruction`, optional `input`, `output`: one user turn and one assistant turn."""

    example: ClassVar[Row] = {
        "instruction": "Name the capital of the country.",
        "input": "France",
        "output": "Paris.",
    }

    type: Literal["alpaca"] = "alpaca"

    def to_conversation(self, row: Row) -> Conversation:
        """A user turn (instruction, blank line, input) and the answer, which is learnt."""
        _refuse(row, "history", "system")
        request = _text(row, "instruction")
        if row.get("input"):
            request = f"{request}\n\n{_text(row, 'input')}"
        return Conversation(
            [
                Message("user", request, train=False),
                Message("assistant", _text(row, "output"), train=True),
            ]
        )


class PromptCompletion(Part):
    """A prompt and the completion to learn."""

    example: ClassVar[Row] = {"prompt": "The capital of France is", "completion": " Paris."}

    type: Literal["prompt_completion"] = "prompt_completion"
    prompt_field: str = "prompt"
    """Column that holds the prompt."""
    completion_field: str = "completion"
    """Column that holds the completion."""
    as_chat: bool = True
    """Put both through the chat template, as a user and an assistant turn; if false, verbatim."""
    system: str | None = None
    """System message put before each prompt (needs `as_chat`)."""

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
        """One user and one assistant turn, or two verbatim pieces; the second of them is learnt."""
        prompt, completion = _text(row, self.prompt_field), _text(row, self.completion_field)
        if not self.as_chat:
            pieces = [Message("text", prompt, train=False), Message("text", completion, train=True)]
            return Conversation(pieces)
        system = [] if self.system is None else [Message("system", self.system, train=False)]
        return Conversation(
            [
                *system,
                Message("user", prompt, train=False),
                Message("assistant", completion, train=True),
            ]
        )


class Text(Part):
    """Plain text, learnt whole."""

    example: ClassVar[Row] = {"text": "Paris is the capital of France."}

    type: Literal["text"] = "text"
    field: str = "text"
    """Column that holds the text (a text file has one row per line, in the column `text`)."""

    def to_conversation(self, row: Row) -> Conversation:
        """One verbatim piece."""
        return Conversation([Message("text", _text(row, self.field), train=True)])


FormatConfig = Annotated[
    Messages | ShareGpt | Alpaca | PromptCompletion | Text, Field(discriminator="type")
]


def _turns(row: Row, field: str) -> list[tuple[str, Mapping[str, Any]]]:
    """The turns of a conversation, each with its place in the row: `messages[2]`."""
    turns = _value(row, field)
    if not isinstance(turns, list):
        raise DataError(f"field '{field}': got {_shown(turns)}, expected a list of messages")
    located = [(f"{field}[{i}]", turn) for i, turn in enumerate(turns)]
    for where, turn in located:
        if not isinstance(turn, Mapping):
            raise DataError(f"field '{where}': got {_shown(turn)}, expected an object")
    return located


def _message(
    turn: Mapping[str, Any], where: str, role_key: str, text_key: str, roles: Mapping[str, Role]
) -> Message:
    name = _value(turn, role_key, where)
    # A list or an object as role is no key of any dictionary.
    role = roles.get(name) if isinstance(name, str) else None
    if role is None:
        raise DataError(
            f"field '{where}.{role_key}': got {_shown(name)}, expected one of {', '.join(roles)}"
        )
    content = _text(turn, text_key, where, may_be_empty=role in _MAY_BE_EMPTY)
    return Message(role, content, train=role == "assistant")


def _learnable(messages: list[Message], field: str) -> list[Message]:
    if not any(message.train for message in messages):
        raise DataError(f"field '{field}': no assistant message, so nothing to learn")
    return messages


def _refuse(values: Mapping[str, Any], *fields: str, where: str = "") -> None:
    for field in fields:
        # Tables hold an empty list as text.
        if values.get(field) not in (None, "", [], {}, "[]", "{}"):
            raise DataError(
                f"field '{_path(where, field)}': got {_shown(values[field])}, which this format "
                "does not read; leaving it out would change what is learnt"
            )


def _text(
    values: Mapping[str, Any], field: str, where: str = "", *, may_be_empty: bool = False
) -> str:
    text = _value(values, field, where)
    if not isinstance(text, str):
        raise DataError(f"field '{_path(where, field)}': got {_shown(text)}, expected text")
    if not may_be_empty and not text.strip():
        raise DataError(f"field '{_path(where, field)}': empty")
    try:
        # JSON may hold half a surrogate pair ("\ud83d"), which no tokenizer takes.
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"field '{_path(where, field)}': character {error.start + 1} is half of a surrogate "
            f"pair ({text[error.start]!r}), which is no text"
        ) from error
    return text


def _value(values: Mapping[str, Any], field: str, where: str = "") -> Any:
    if field not in values:
        found = ", ".join(map(repr, values)) or "nothing"
        raise DataError(f"field '{_path(where, field)}': missing; found {found}")
    return values[field]


def _path(where: str, field: str) -> str:
    return f"{where}.{field}" if where else field


def _shown(value: object) -> str:
    """A value as an error shows it: its type where that is the news, and never a screenful."""
    text = repr(value)
    text = text if len(text) <= 60 else f"{text[:60]}..."
    if value is None:
        return "null"
    return text if isinstance(value, str) else f"{text} ({type(value).__name__})"
