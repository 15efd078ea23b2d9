"""Format for pairs of answers, one of them preferred."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar, Literal

from qlora_cli.common.config import Config
from qlora_cli.data.formats.turns import check_order, messages_of, read_tools
from qlora_cli.errors import DataError
from qlora_cli.types import Conversation, Message, Row, RowKind

_PROMPTS = ("prompt", "conversations", "messages")


class Preference(Config):
    """A prompt with two answers, `chosen` and `rejected`: read and previewed, not yet trained on.

    The answers are texts, messages or lists of messages (OpenAI or ShareGPT). The prompt is a text
    or a list of messages in the column `prompt`, `conversations` or `messages`; without one, both
    answers are whole conversations.
    """

    example: ClassVar[Row] = {
        "prompt": "The capital of France?",
        "chosen": "Paris.",
        "rejected": "It may be Lyon.",
    }

    rows: ClassVar[RowKind] = "pairs"
    type: Literal["preference"] = "preference"
    chosen_field: str = "chosen"
    """Column that holds the preferred answer."""
    rejected_field: str = "rejected"
    """Column that holds the other answer."""

    def to_conversation(self, row: Row) -> Conversation:
        """Read the prompt with the chosen answer, and as `rejected` the prompt with the other."""
        prompt = _prompt(row)
        return Conversation(
            _answered(prompt, row, self.chosen_field),
            tools=read_tools(row),
            rejected=_answered(prompt, row, self.rejected_field),
        )

    def as_trainable(self, row: Row) -> dict[str, str]:
        """Return the format settings that read the chosen answer of a row for training."""
        for field in _PROMPTS:
            if row.get(field) is not None:
                columns = {"prompt_field": field, "completion_field": self.chosen_field}
                return {"type": "prompt_completion", **columns}
        turn = row[self.chosen_field][0]
        is_sharegpt = isinstance(turn, Mapping) and "from" in turn
        return {"type": "sharegpt" if is_sharegpt else "messages", "field": self.chosen_field}


def _prompt(row: Row) -> list[Message]:
    found = [field for field in _PROMPTS if row.get(field) is not None]
    if len(found) > 1:
        raise DataError(f"field '{found[1]}': '{found[0]}' has a prompt too")
    if not found:
        return []
    messages = messages_of(row, found[0], "user")
    # Answers in the prompt belong to neither of the two.
    return [replace(message, train=False) for message in messages]


def _answered(prompt: list[Message], row: Row, field: str) -> list[Message]:
    answer = messages_of(row, field, "assistant")
    if not prompt and len(answer) < 2:
        raise DataError(
            f"field '{field}': no prompt; expected a column {', '.join(_PROMPTS)}, or the whole "
            "conversation here"
        )
    return check_order([*prompt, *answer], f"prompt + {field}" if prompt else field)
