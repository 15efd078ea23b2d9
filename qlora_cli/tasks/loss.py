"""How likely a model finds the answers of held-out rows."""

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


class TokenTask(Task):
    """A task that scores given tokens by their likelihood; its questions are (place, example)."""

    def examine(self, model: Scorer, questions: Sequence[tuple[str, Example]]) -> list[Outcome]:
        sums = model.log_likelihoods([example for _, example in questions])
        return [
            Outcome(place, "", "", "", {"nats": -log_p, "tokens": example.num_supervised})
            for (place, example), log_p in zip(questions, sums, strict=True)
        ]


class Loss(TokenTask):
    """Cross-entropy in nats a learnt token, over all tokens of all rows together.

    Rows are prepared as for training, and `evaluation.limit` does not shorten them. On
    `data.evaluation` it is measured in any case.
    """

    type: Literal["loss"] = "loss"

    def measures(self) -> Sequence[Measure]:
        return [
            Measure(
                "loss", mean_per_token, lower_is_better=True, is_share=False, is_per_token=True
            ),
            Measure(
                "perplexity", perplexity, lower_is_better=True, is_share=False, is_per_token=True
            ),
        ]

    def questions(
        self,
        sources: Sequence[Source],
        tokenizer: PreTrainedTokenizerFast,
        settings: Data,
        *,
        limit: int | None,
    ) -> list[tuple[str, Example]]:
        """All examples, each with the place of its row."""
        prepared, _ = load_or_prepare(sources, tokenizer, settings)
        return [(prepared.examples.place(i), one) for i, one in enumerate(prepared.examples)]


def token_measure(name: str, aggregate: Callable[[Values], NDArray[float64]]) -> Measure:
    """A figure by the token, the less the better."""
    return Measure(name, aggregate, lower_is_better=True, is_share=False, is_per_token=True)


def mean_per_token(values: Values) -> NDArray[float64]:
    """Nats over tokens, both summed over the examples first."""
    mean: NDArray[float64] = values["nats"].sum(-1) / values["tokens"].sum(-1)
    return mean


def perplexity(values: Values) -> NDArray[float64]:
    """The exponential of that."""
    import numpy as np

    found: NDArray[float64] = np.exp(np.minimum(mean_per_token(values), 700.0))
    return found
