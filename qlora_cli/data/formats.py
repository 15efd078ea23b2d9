"""From a row of a data source to messages. To add a format: one class here, and its name in the union."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from qlora_cli.part import Part
from qlora_cli.types import Message, Row


class Messages(Part):
    """Conversations in the OpenAI manner: `{"messages": [{"role": ..., "content": ...}, ...]}`."""

    type: Literal["messages"] = "messages"
    field: str = "messages"
    """Column that holds the list of messages."""

    def to_messages(self, row: Row) -> list[Message]: ...


class ShareGpt(Part):
    """Conversations as `{"conversations": [{"from": "human" | "gpt" | ..., "value": ...}, ...]}`."""

    type: Literal["sharegpt"] = "sharegpt"
    field: str = "conversations"
    """Column that holds the list of turns."""

    def to_messages(self, row: Row) -> list[Message]: ...


class Alpaca(Part):
    """`instruction`, optional `input`, `output`: one user turn and one assistant turn."""

    type: Literal["alpaca"] = "alpaca"

    def to_messages(self, row: Row) -> list[Message]: ...


class PromptCompletion(Part):
    """A prompt and the completion to learn."""

    type: Literal["prompt_completion"] = "prompt_completion"
    prompt_field: str = "prompt"
    """Column that holds the prompt."""
    completion_field: str = "completion"
    """Column that holds the completion."""
    as_chat: bool = True
    """Put both through the chat template, as a user and an assistant turn; if false, verbatim."""
    system: str | None = None
    """System message put before each prompt (needs `as_chat`)."""

    def to_messages(self, row: Row) -> list[Message]: ...


class Text(Part):
    """Plain text, learnt whole."""

    type: Literal["text"] = "text"
    field: str = "text"
    """Column that holds the text (a text file has one row per line, in the column `text`)."""

    def to_messages(self, row: Row) -> list[Message]: ...


FormatConfig = Annotated[
    Messages | ShareGpt | Alpaca | PromptCompletion | Text, Field(discriminator="type")
]
