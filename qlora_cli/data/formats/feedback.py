"""Format for answers that are good or bad, each to a prompt of its own."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import model_validator

from qlora_cli.common.config import Config
from qlora_cli.data.formats.answers import (
    PROMPTS,
    read_prompt,
    supervise_last,
    truth_of,
    with_system,
)
from qlora_cli.data.formats.fields import list_of, shown, value_of
from qlora_cli.data.formats.turns import check_order, messages_of, read_tools, read_turns
from qlora_cli.errors import DataError
from qlora_cli.types import Conversation, Message, Row, RowKind

_WHOLE = ("messages", "conversations")


class Feedback(Config):
    """An answer and whether it is good: `prompt`, `completion`, `label` (for the objective `kto`).

    Prompt and completion are texts, messages or lists of messages (OpenAI or ShareGPT). Without a
    completion, `messages` or `conversations` is the whole conversation, and its last answer is the
    one that is good or bad. The columns `system` and `tools` are read where the row has them.
    """

    example: ClassVar[Row] = {
        "label": True,
        "prompt": "The capital of France?",
        "completion": "Paris.",
    }

    rows: ClassVar[RowKind] = "feedback"
    type: Literal["feedback"] = "feedback"
    prompt_field: str | None = None
    """Column that holds the prompt; null takes `prompt`, `conversations` or `messages`."""
    completion_field: str = "completion"
    """Column that holds the answer."""
    label_field: str = "label"
    """Column that is true for a good answer and false for a bad one (also 1 and 0)."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = [self.completion_field, self.label_field, self.prompt_field]
        if repeated := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"two of the columns are the same one ({repeated[0]!r})")
        return self

    def to_conversation(self, row: Row) -> Conversation:
        """Read the prompt and the answer, which is the only supervised part, and the label."""
        label = truth_of(row, self.label_field)
        if label is None:
            found = shown(value_of(row, self.label_field))
            raise DataError(
                f"field '{self.label_field}': got {found}, expected true or false (or 1 or 0)"
            )
        return Conversation(self._messages(row), tools=read_tools(row), label=label)

    def _messages(self, row: Row) -> list[Message]:
        given = [field for field in _WHOLE if row.get(field) is not None]
        has_prompt = self.prompt_field is not None or row.get("prompt") is not None
        if row.get(self.completion_field) is None and given and not has_prompt:
            if len(given) > 1:
                raise DataError(f"field '{given[1]}': '{given[0]}' has a conversation too")
            turns = read_turns(list_of(row, given[0]))
            return supervise_last(with_system(row, turns), given[0])
        completion = messages_of(row, self.completion_field, "assistant")
        prompt = read_prompt(row, self.prompt_field)
        if not prompt:
            raise DataError(
                f"field 'prompt': missing; expected a column {', '.join(PROMPTS)} (or another one, "
                "named in format.prompt_field)"
            )
        place = f"prompt + {self.completion_field}"
        return check_order([*with_system(row, prompt), *completion], place)
