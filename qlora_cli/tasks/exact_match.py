"""Compare the generated answer with the reference as text."""

from __future__ import annotations

import unicodedata
from typing import Literal

from qlora_cli.errors import DataError
from qlora_cli.tasks.pattern import AnswerPattern, last_match
from qlora_cli.tasks.task import Task, after_reasoning


class ExactMatch(Task):
    """The answer equals the reference, apart from white space at both ends.

    The reference of tool calls and of reasoning is the text that the chat template writes for them.
    With `pattern` or `anywhere`, the reasoning of the reference is left out.
    """

    type: Literal["exact_match"] = "exact_match"
    pattern: AnswerPattern | None = None
    """Regular expression for the part of the answer to compare: its last match, or the first group
    of that match. An answer without a match is wrong; a reference without one is compared whole."""
    ignore_case: bool = False
    """Compare without regard to case."""
    ignore_punctuation: bool = False
    """Ignore all Unicode punctuation."""
    ignore_space: bool = False
    """Treat any run of white space as one space."""
    anywhere: bool = False
    """Accept an answer that contains the reference anywhere."""

    def score(self, reference: str, answer: str) -> float:
        """Return 1.0 for a match, else 0.0."""
        found: str | None = answer
        if self.pattern is not None or self.anywhere:
            reference = after_reasoning(reference)
        if self.pattern is not None:
            found = last_match(self.pattern, answer)
            reference = last_match(self.pattern, reference) or reference
        expected = self._normal(reference)
        if reference and not expected:
            raise DataError(
                f"exact_match: the reference {reference[:80]!r} is empty without what is ignored"
            )
        if found is None:
            return 0.0
        found = self._normal(found)
        return float(expected in found if self.anywhere else expected == found)

    def _normal(self, text: str) -> str:
        if self.ignore_case:
            text = text.casefold()
        if self.ignore_punctuation:
            text = "".join(c for c in text if not unicodedata.category(c).startswith("P"))
        return " ".join(text.split()) if self.ignore_space else text.strip()
