"""Does the model find the right label likeliest?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from qlora_cli.data.config import Data
from qlora_cli.data.encode.encoder import Encoder
from qlora_cli.data.sources import Source
from qlora_cli.errors import DataError
from qlora_cli.tasks.choice import Choice, ChoiceTask, asked, encode_choice
from qlora_cli.tasks.task import Measure, Values, mean_of, read_rows
from qlora_cli.types import Conversation

if TYPE_CHECKING:
    from numpy import float64
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerFast


class Classification(ChoiceTask):
    """The likeliest of the labels is the answer in the row: accuracy, and F1 averaged over labels.

    Rows are those of a training on labels; the label is the last answer.
    """

    type: Literal["classification"] = "classification"
    labels: list[str] | None = Field(None, min_length=2)
    """All labels; null takes those that the rows have."""

    def measures(self) -> Sequence[Measure]:
        return [mean_of("classification"), Measure("macro_f1", macro_f1)]

    def questions(
        self,
        sources: Sequence[Source],
        tokenizer: PreTrainedTokenizerFast,
        settings: Data,
        *,
        limit: int | None,
    ) -> list[Choice]:
        rows = [row for source in sources for row in read_rows(source, settings)]
        labels = self.labels or sorted({_label(row) for row in rows})
        if len(labels) < 2:
            raise DataError(
                f"{self.label}: all rows have one label, {labels[0]!r}",
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

    def values(self, question: Choice, log_p: list[float]) -> dict[str, float]:
        chosen = log_p.index(max(log_p))
        return {
            "classification": float(chosen == question.answer),
            "_chosen": chosen,
            "_label": question.answer,
        }


def macro_f1(values: Values) -> NDArray[float64]:
    """The mean of F1 over the labels that are right, or chosen, for at least one example."""
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
    return asked(row)[1].content.strip()


def _choice(
    encoder: Encoder, tokenizer: PreTrainedTokenizerFast, row: Conversation, labels: list[str]
) -> Choice:
    before, turn = asked(row)
    label = turn.content.strip()
    if label not in labels:
        raise DataError(f"the answer {label[:80]!r} is none of the labels {', '.join(labels)}")
    # Of a verbatim completion, the space before it belongs to each of them.
    separator = turn.content[: turn.content.index(label)] if turn.role == "text" else ""
    return encode_choice(
        encoder,
        tokenizer,
        before,
        turn,
        labels,
        labels.index(label),
        row.place,
        separator=separator,
    )
