"""Loss and perplexity on held-out rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

from qlora_cli.data.config import Data
from qlora_cli.data.prepared.cache import load_or_prepare
from qlora_cli.data.sources import Source
from qlora_cli.tasks.task import Measure, Outcome, Scorer, Task, Values
from qlora_cli.types import Example

if TYPE_CHECKING:
    from numpy import float64
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerFast


class Loss(Task):
    """Cross-entropy in nats per supervised token, over all tokens of all rows together.

    Rows are prepared as for training, and `evaluation.limit` does not apply to them. The loss on
    `data.evaluation` is always measured; it needs no entry here.
    """

    type: Literal["loss"] = "loss"

    def measures(self) -> Sequence[Measure]:
        return [
            token_measure("loss", mean_per_token),
            token_measure("perplexity", perplexity),
        ]

    def read_items(
        self,
        sources: Sequence[Source],
        tokenizer: PreTrainedTokenizerFast,
        settings: Data,
        *,
        limit: int | None,
    ) -> list[tuple[str, Example]]:
        """Prepare all examples, each with the location of its row."""
        prepared, _ = load_or_prepare(sources, tokenizer, settings)
        return [(prepared.examples.place(i), one) for i, one in enumerate(prepared.examples)]

    def place_and_length(self, item: tuple[str, Example]) -> tuple[str, int]:
        place, example = item
        return place, len(example.input_ids)

    def evaluate(self, scorer: Scorer, items: Sequence[tuple[str, Example]]) -> list[Outcome]:
        return evaluate_tokens(scorer, items)


def evaluate_tokens(scorer: Scorer, items: Sequence[tuple[str, Example]]) -> list[Outcome]:
    """Score the supervised tokens of each (place, example) by their likelihood."""
    sums = scorer.log_likelihoods([example for _, example in items])
    return [
        Outcome(place, "", "", "", {"nats": -log_p, "tokens": example.num_supervised})
        for (place, example), log_p in zip(items, sums, strict=True)
    ]


def token_measure(name: str, aggregate: Callable[[Values], NDArray[float64]]) -> Measure:
    """Make a measure per token; lower is better."""
    return Measure(name, aggregate, lower_is_better=True, is_share=False, is_per_token=True)


def mean_per_token(values: Values) -> NDArray[float64]:
    """Divide nats by tokens, each summed over the examples first."""
    mean: NDArray[float64] = values["nats"].sum(-1) / values["tokens"].sum(-1)
    return mean


def perplexity(values: Values) -> NDArray[float64]:
    """Compute the exponential of `mean_per_token`."""
    import numpy as np

    found: NDArray[float64] = np.exp(np.minimum(mean_per_token(values), 700.0))
    return found
