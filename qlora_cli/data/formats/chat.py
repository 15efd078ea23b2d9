"""Formats for conversations."""

from __future__ import annotations

from typing import ClassVar, Literal

from qlora_cli.common.config import Config
from qlora_cli.data.formats.fields import as_object, list_of, optional_text
from qlora_cli.data.formats.turns import check_order, openai_message, read_tools, sharegpt_message
from qlora_cli.types import Conversation, Message, Row, RowKind


class Messages(Config):
    """Conversations in OpenAI's shape: `{"messages": [{"role": ..., "content": ...}, ...]}`.

    Also read: `tool_calls` and the column `tools`, `reasoning_content`, and `train` (true or false)
    or `weight` (1 or 0) on a message, which decide if it is trained on, whatever its role.
    """

    example: ClassVar[Row] = {
        "messages": [
            {"role": "system", "content": "Answer in one word."},
            {"role": "user", "content": "The capital of France?"},
            {"role": "assistant", "content": "Paris."},
        ]
    }

    rows: ClassVar[RowKind] = "answers"
    type: Literal["messages"] = "messages"
    field: str = "messages"
    """Column that holds the list of messages."""

    def to_conversation(self, row: Row) -> Conversation:
        """Read the messages of a row. Assistant turns are trained on unless `train: false`."""
        turns = list_of(row, self.field)
        messages = [openai_message(as_object(turn, where), where) for where, turn in turns]
        return Conversation(check_order(messages, self.field), tools=read_tools(row))


class ShareGpt(Config):
    """Conversations as `{"conversations": [{"from": "human" | "gpt" | ..., "value": ...}]}`.

    Also read: the roles `function_call` (JSON text with `name` and `arguments`) and
    `observation`, and the columns `tools` and `system`.
    """

    example: ClassVar[Row] = {
        "conversations": [
            {"from": "human", "value": "The capital of France?"},
            {"from": "gpt", "value": "Paris."},
            {"from": "human", "value": "And of Spain?"},
            {"from": "gpt", "value": "Madrid."},
        ]
    }

    rows: ClassVar[RowKind] = "answers"
    type: Literal["sharegpt"] = "sharegpt"
    field: str = "conversations"
    """Column that holds the list of turns."""

    def to_conversation(self, row: Row) -> Conversation:
        """Read the messages of a row. Turns from `gpt` or `function_call` are trained on."""
        turns = list_of(row, self.field)
        messages = [sharegpt_message(as_object(turn, where), where) for where, turn in turns]
        checked = check_order(messages, self.field)
        system = optional_text(row, "system")
        if system is not None:
            checked = check_order([Message("system", system, train=False), *checked], self.field)
        return Conversation(checked, tools=read_tools(row))
