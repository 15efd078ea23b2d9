"""chrF: character n-gram overlap of the generated answer with the reference, by sacrebleu."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from qlora_cli.errors import RecipeError
from qlora_cli.tasks.task import Measure, Task, Values

if TYPE_CHECKING:
    from numpy import float64
    from numpy.typing import NDArray

_CHARACTERS = 6
"""Longest character n-gram."""
_BETA = 2
"""Weight of recall relative to precision."""


class ChrF(Task):
    """chrF of all examples together (Popović 2015, https://aclanthology.org/W15-3049/).

    It works in any script. Like `sacrebleu`, it sums the matches over all examples before it
    divides. Needs the extra `scores`.
    """

    type: Literal["chrf"] = "chrf"
    word_order: int = Field(0, ge=0, le=4)
    """Longest word n-gram that counts in addition; 2 is chrF++."""
    ignore_case: bool = False
    """Compare without regard to case."""

    def score(self, reference: str, answer: str) -> float:
        """Compute chrF of one answer, from 0 to 1."""
        library = _library(self.word_order, self.ignore_case)
        return float(library.sentence_score(answer, [reference]).score) / 100

    def values(self, reference: str, answer: str) -> dict[str, float]:
        """Return chrF, and the n-gram counts of answer, reference and both, for each order."""
        library = _library(self.word_order, self.ignore_case)
        [counts] = library._extract_corpus_statistics([answer], [[reference]])
        named = zip(self._names(), counts, strict=True)
        return {"chrf": self.score(reference, answer), **{n: float(c) for n, c in named}}

    def measures(self) -> Sequence[Measure]:
        return [Measure("chrf", self._of_all)]

    def _names(self) -> list[str]:
        orders = range(_CHARACTERS + self.word_order)
        return [
            f"{kind}_{order}" for order in orders for kind in ("_answer", "_reference", "_both")
        ]

    def _of_all(self, values: Values) -> NDArray[float64]:
        import numpy as np

        sums = np.stack([values[name].sum(-1) for name in self._names()], -1)  # (..., 3 * orders)
        answers, references, both = (sums[..., i::3] for i in range(3))
        counted = (answers > 0) & (references > 0)
        orders = np.maximum(counted.sum(-1), 1)
        precision = np.where(counted, both / np.maximum(answers, 1), 0).sum(-1) / orders
        recall = np.where(counted, both / np.maximum(references, 1), 0).sum(-1) / orders
        weighted = np.maximum(_BETA**2 * precision + recall, np.finfo(np.float64).tiny)
        score: NDArray[float64] = (1 + _BETA**2) * precision * recall / weighted
        return score


@lru_cache
def _library(word_order: int, ignore_case: bool) -> Any:
    try:
        from sacrebleu.metrics.chrf import CHRF
    except ImportError as error:
        raise RecipeError(
            "evaluation.tasks: chrf needs the package sacrebleu, which is not installed",
            hint='pip install "qlora[scores]"',
        ) from error
    return CHRF(_CHARACTERS, word_order, _BETA, lowercase=ignore_case)
