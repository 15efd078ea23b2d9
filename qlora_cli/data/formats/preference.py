"""Format for pairs of answers, one of them preferred."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, Self

from pydantic import model_validator

from qlora_cli.common.config import Config
from qlora_cli.data.formats.answers import (
    PROMPTS,
    answer_start,
    difference,
    is_whole,
    number_of,
    read_prompt,
    supervise_last,
    with_system,
)
from qlora_cli.data.formats.turns import check_order, messages_of, read_tools
from qlora_cli.errors import DataError
from qlora_cli.types import Conversation, Message, Row, RowKind


class Preference(Config):
    """A prompt with two answers, `chosen` and `rejected` (for the objectives `dpo`, `orpo`, `simpo`
    and `reward`).

    The answers are texts, messages or lists of messages (OpenAI or ShareGPT). The prompt is a text
    or a list of messages in the column `prompt`, `conversations` or `messages`, with the columns
    `system` and `tools` where the row has them. Without a prompt, both answers are whole
    conversations that are the same up to the last answer. `score_chosen` and `score_rejected`, or
    `margin`, say by how much the chosen answer is better, where the row has them.
    """

    example: ClassVar[Row] = {
        "prompt": "The capital of France?",
        "chosen": "Paris.",
        "rejected": "It may be Lyon.",
    }

    rows: ClassVar[RowKind] = "pairs"
    type: Literal["preference"] = "preference"
    prompt_field: str | None = None
    """Column that holds the prompt; null takes `prompt`, `conversations` or `messages`. With
    `instruction`, the column `input` is read too."""
    chosen_field: str = "chosen"
    """Column that holds the preferred answer."""
    rejected_field: str = "rejected"
    """Column that holds the other answer."""
    score_chosen_field: str = "score_chosen"
    """Column that holds the score of the preferred answer, if there is one."""
    score_rejected_field: str = "score_rejected"
    """Column that holds the score of the other answer, if there is one."""
    margin_field: str = "margin"
    """Column that holds the difference of the scores, if there is one."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = [value for name, value in self if name.endswith("_field") and value is not None]
        if repeated := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"two of the columns are the same one ({repeated[0]!r})")
        return self

    def to_conversation(self, row: Row) -> Conversation:
        """Read the prompt with the chosen answer, and as `rejected` the prompt with the other."""
        self._check_answers(row)
        chosen = messages_of(row, self.chosen_field, "assistant")
        rejected = messages_of(row, self.rejected_field, "assistant")
        if is_whole(chosen) and is_whole(rejected):
            chosen, rejected = self._of_whole(row, chosen, rejected)
        else:
            prompt = read_prompt(row, self.prompt_field)
            chosen = _answered(row, prompt, chosen, self.chosen_field)
            rejected = _answered(row, prompt, rejected, self.rejected_field)
        return Conversation(
            chosen, tools=read_tools(row), rejected=rejected, margin=self._margin(row)
        )

    def as_trainable(self, row: Row) -> dict[str, str]:
        """Return the format settings that read the chosen answer of a row for training."""
        turn = row[self.chosen_field]
        if isinstance(turn, list) and is_whole(messages_of(row, self.chosen_field, "assistant")):
            is_sharegpt = isinstance(turn[0], Mapping) and "from" in turn[0]
            return {"type": "sharegpt" if is_sharegpt else "messages", "field": self.chosen_field}
        given = (field for field in PROMPTS if row.get(field) is not None)
        prompt = self.prompt_field or next(given)
        columns = {"prompt_field": prompt, "completion_field": self.chosen_field}
        return {"type": "prompt_completion", **columns}

    def _check_answers(self, row: Row) -> None:
        """Raise DataError if a row has one answer alone."""
        fields = self.chosen_field, self.rejected_field
        for field, other in (fields, reversed(fields)):
            if field in row and row[field] is None and row.get(other) is not None:
                raise DataError(
                    f"field '{field}': got null, and '{other}' has an answer; a pair needs both"
                )

    def _of_whole(
        self, row: Row, chosen: list[Message], rejected: list[Message]
    ) -> tuple[list[Message], list[Message]]:
        """Check two whole conversations, which differ in their last answer alone."""
        start = self._check_beginnings(chosen, rejected)
        pair = (
            supervise_last(with_system(row, chosen), self.chosen_field),
            supervise_last(with_system(row, rejected), self.rejected_field),
        )
        self._check_prompt(row, chosen[:start])
        return pair

    def _check_beginnings(self, chosen: Sequence[Message], rejected: Sequence[Message]) -> int:
        """Return the index of the last answer.

        Raises:
            DataError: the conversations are not the same up to there.
        """
        start = max(answer_start(chosen), answer_start(rejected))
        for at in range(start):
            found = None
            for messages, field, other in (
                (chosen, self.chosen_field, self.rejected_field),
                (rejected, self.rejected_field, self.chosen_field),
            ):
                if at >= len(messages):
                    found = f"field '{field}': ends before '{other}[{at}]'"
            if found is None:
                place = f"{self.chosen_field}[{at}]"
                differs = difference(rejected[at], chosen[at], place)
                found = differs and f"field '{self.rejected_field}[{at}]': {differs}"
            if found is not None:
                raise DataError(
                    f"{found}; the two conversations have to be the same up to the last answer"
                )
        return start

    def _check_prompt(self, row: Row, prompt: Sequence[Message]) -> None:
        """Check that a prompt, given in addition to whole conversations, is theirs."""
        field = self.prompt_field or "prompt"
        if row.get(field) is None:
            return
        said, found = messages_of(row, field, "user"), None
        if isinstance(row[field], str):
            # By data set, a text is the first question of the conversation or the last.
            questions = [message for message in prompt if message.role == "user"]
            if not any(one.content.strip() == said[0].content.strip() for one in questions):
                found = difference(said[0], questions[0], self.chosen_field)
        elif len(said) > len(prompt):
            found = f"{len(said)} messages; {self.chosen_field} has {len(prompt)} before its answer"
        else:
            pairs = zip(said, prompt[-len(said) :], strict=True)
            found = next(filter(None, (difference(*p, self.chosen_field) for p in pairs)), None)
        if found:
            raise DataError(
                f"field '{field}': {found}; if it is not the prompt, rename the column with "
                f"fields: {{other: {field}}}"
            )

    def _margin(self, row: Row) -> float | None:
        """Return by how much the chosen answer is better, if the row says so."""
        fields = self.score_chosen_field, self.score_rejected_field
        better, worse = (number_of(row, field) for field in fields)
        margin = number_of(row, self.margin_field)
        if (better is None) is not (worse is None):
            absent, given = fields if better is None else reversed(fields)
            raise DataError(f"field '{absent}': missing, and '{given}' has a score")
        if better is None or worse is None:
            return margin
        if margin is not None and not math.isclose(
            margin, better - worse, rel_tol=1e-4, abs_tol=1e-4
        ):
            raise DataError(
                f"field '{self.margin_field}': got {margin:g}, but {fields[0]} - {fields[1]} is "
                f"{better - worse:g}"
            )
        return better - worse


def _answered(row: Row, prompt: list[Message], answer: list[Message], field: str) -> list[Message]:
    if not prompt:
        raise DataError(
            f"field '{field}': no prompt; expected a column {', '.join(PROMPTS)} (or another one, "
            "named in format.prompt_field), or the whole conversation here"
        )
    return check_order([*with_system(row, prompt), *answer], f"prompt + {field}")
