"""Choose the most likely label of a row."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from qlora_cli.data.config import Data
from qlora_cli.data.encode.encoder import Encoder
from qlora_cli.data.prepared.labels import WAY_OUT, label_variants, plain_label, variants_text
from qlora_cli.data.sources import Source
from qlora_cli.errors import DataError
from qlora_cli.tasks.choice import (
    ChoiceItem,
    encode_choice,
    evaluate_choices,
    place_and_length,
    split_at_answer,
)
from qlora_cli.tasks.task import Measure, Outcome, Scorer, Task, Values, mean_of, read_rows
from qlora_cli.types import Conversation

if TYPE_CHECKING:
    from numpy import float64
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerFast


log = logging.getLogger("qlora")


class Classification(Task):
    """The most likely label is the row's answer: accuracy, and F1 averaged over labels.

    Rows have the same form as for training on labels: the last answer is the label.
    """

    type: Literal["classification"] = "classification"
    labels: list[str] | None = Field(None, min_length=2)
    """All labels; null takes the labels found in the rows. Blanks around them do not count."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        labels = self.labels or []
        for label in labels:
            if label != label.strip():
                raise ValueError(
                    f"labels: found {label!r}; answers are compared without blanks around them, so "
                    f"write {label.strip()!r}"
                )
        if twice := [label for label, count in Counter(labels).items() if count > 1]:
            raise ValueError(f"labels: {twice[0]!r} is there twice")
        return self

    def measures(self) -> Sequence[Measure]:
        return [mean_of("classification"), Measure("macro_f1", macro_f1)]

    def read_items(
        self,
        sources: Sequence[Source],
        tokenizer: PreTrainedTokenizerFast,
        settings: Data,
        *,
        limit: int | None,
    ) -> list[ChoiceItem]:
        rows = [row for source in sources for row in read_rows(source, settings)]
        counts = Counter(map(_label, rows))
        labels = self.labels or sorted(counts)
        for group in label_variants(counts):
            log.warning(
                "%s: labels that differ only in blanks or case are scored as different: %s; %s",
                self.label,
                variants_text(group),
                WAY_OUT,
            )
        if len(labels) < 2:
            raise DataError(
                f"{self.label}: all rows have the same label, {labels[0]!r}",
                hint="name the labels in the task: labels: [positive, negative]",
            )
        encoder = Encoder(tokenizer)
        choices = []
        for row in rows[:limit]:
            try:
                choices.append(_choice(encoder, tokenizer, row, labels))
            except DataError as error:
                raise DataError(f"{row.place}: {error}", hint=error.hint) from error
        return choices

    def place_and_length(self, item: ChoiceItem) -> tuple[str, int]:
        return place_and_length(item)

    def evaluate(self, scorer: Scorer, items: Sequence[ChoiceItem]) -> list[Outcome]:
        return evaluate_choices(scorer, items, self._values)

    def _values(self, item: ChoiceItem, log_p: list[float]) -> dict[str, float]:
        chosen = log_p.index(max(log_p))
        return {
            "classification": float(chosen == item.answer),
            "_chosen": chosen,
            "_label": item.answer,
        }


def macro_f1(values: Values) -> NDArray[float64]:
    """Average F1 over the labels that are correct or chosen for at least one example."""
    import numpy as np

    chosen, label = values["_chosen"], values["_label"]
    total, number = np.zeros(label.shape[:-1]), np.zeros(label.shape[:-1])
    for one in np.union1d(chosen, label):
        hits = ((chosen == one) & (label == one)).sum(-1)
        either = (chosen == one).sum(-1) + (label == one).sum(-1)
        total += 2 * hits / np.maximum(either, 1)
        number += either > 0
    f1: NDArray[float64] = total / number
    return f1


def _label(row: Conversation) -> str:
    turn = split_at_answer(row)[1]
    if turn.tool_calls:
        raise DataError(
            f"{row.place}: the answer calls a tool ({turn.tool_calls[0].name}), and the task "
            "classification compares texts",
            hint="use the task exact_match for tool calls",
        )
    return turn.content.strip()


def _choice(
    encoder: Encoder, tokenizer: PreTrainedTokenizerFast, row: Conversation, labels: list[str]
) -> ChoiceItem:
    prompt, turn = split_at_answer(row)
    label = turn.content.strip()
    if label not in labels:
        alike = [one for one in labels if plain_label(one) == plain_label(label)]
        raise DataError(
            f"the answer {label[:80]!r} is not one of the labels {', '.join(labels)}",
            hint=f"it differs from {alike[0]!r} only in blanks or case: {WAY_OUT}"
            if alike
            else None,
        )
    # In verbatim text, the space before the label belongs to every option.
    start = turn.content[: turn.content.index(label)] if turn.role == "text" else ""
    return encode_choice(
        encoder,
        tokenizer,
        prompt,
        replace(turn, content=start),
        labels,
        labels.index(label),
        row.place,
    )
