"""Pairs of answers, one of them preferred."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, Literal

from qlora_cli.data.formats.fields import as_list, as_object, shown, text_of, value_of
from qlora_cli.data.formats.turns import check_order, read_tools, read_turns
from qlora_cli.errors import DataError
from qlora_cli.part import Part
from qlora_cli.types import Conversation, Message, Row

_PROMPTS = ("prompt", "conversations", "messages")


class Preference(Part):
    """A prompt with two answers, `chosen` and `rejected`. Read and previewed, not yet trained on.

    The answers are texts, messages or lists of messages (OpenAI or ShareGPT). The prompt is a text
    or a list of messages in the column `prompt`, `conversations` or `messages`; without one, both
    answers are whole conversations.
    """

    example: ClassVar[Row] = {
        "prompt": "The capital of France?",
        "chosen": "Paris.",
        "rejected": "It may be Lyon.",
    }

    type: Literal["preference"] = "preference"
    chosen_field: str = "chosen"
    """Column that holds the answer to prefer."""
    rejected_field: str = "rejected"
    """Column that holds the other answer."""

    def to_conversation(self, row: Row) -> Conversation:
        """The prompt with the chosen answer; in `rejected`, the prompt with the other one."""
        prompt = _prompt(row)
        return Conversation(
            _answered(prompt, row, self.chosen_field),
            tools=read_tools(row),
            rejected=_answered(prompt, row, self.rejected_field),
        )


def _prompt(row: Row) -> list[Message]:
    found = [field for field in _PROMPTS if row.get(field) is not None]
    if len(found) > 1:
        raise DataError(f"field '{found[1]}': there is a prompt in '{found[0]}' too")
    if not found:
        return []
    messages = _messages(row, found[0], "user")
    # Answers in the prompt were given by neither of the two.
    return [replace(message, train=False) for message in messages]


def _answered(prompt: list[Message], row: Row, field: str) -> list[Message]:
    answer = _messages(row, field, "assistant")
    if not prompt and len(answer) < 2:
        raise DataError(
            f"field '{field}': no prompt; expected a column {', '.join(_PROMPTS)}, or the whole "
            "conversation here"
        )
    return check_order([*prompt, *answer], f"prompt + {field}" if prompt else field)


def _messages(row: Row, field: str, role: Literal["user", "assistant"]) -> list[Message]:
    value: Any = value_of(row, field)
    if isinstance(value, str):
        return [Message(role, text_of(row, field), train=role == "assistant")]
    if isinstance(value, list):
        turns = as_list(value, field, "a list of messages")
        if not turns:
            raise DataError(f"field '{field}': got {shown(value)}, expected messages")
        return read_turns(turns)
    if value is None:
        raise DataError(f"field '{field}': got null, expected text or messages")
    return read_turns([(field, as_object(value, field))])
