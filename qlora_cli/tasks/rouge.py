"""ROUGE: overlap of the generated answer with the reference, by the library rouge-score."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal

from qlora_cli.errors import DataError, RecipeError
from qlora_cli.tasks.task import Task


class Rouge(Task):
    """ROUGE F-measure (Lin 2004, https://aclanthology.org/W04-1013/), for English only.

    The library finds only words of the letters a to z and digits. Needs the extra `scores`.
    """

    type: Literal["rouge"] = "rouge"
    variant: Literal["rouge1", "rouge2", "rougeL", "rougeLsum"] = "rougeL"
    """Words, word pairs, longest common subsequence, or longest common subsequence per line."""
    stem: bool = False
    """Treat words with the same stem as equal (Porter's algorithm)."""

    def score(self, reference: str, answer: str) -> float:
        """Compute the F-measure, from 0 to 1."""
        if not any(c.isascii() and c.isalnum() for c in reference):
            raise DataError(
                f"rouge finds no word in the reference {reference[:80]!r}: it reads only "
                "the letters a to z and digits",
                hint="use the task chrf, which works in any script",
            )
        score = _scorer(self.variant, self.stem).score(reference, answer)[self.variant]
        return float(score.fmeasure)


@lru_cache
def _scorer(variant: str, stem: bool) -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise RecipeError(
            "evaluation.tasks: rouge needs the package rouge-score, which is not installed",
            hint='pip install "qlora[scores]"',
        ) from error
    return RougeScorer([variant], use_stemmer=stem)
