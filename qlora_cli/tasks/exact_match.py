"""Does the generated answer equal the reference, as text?"""

from __future__ import annotations

import unicodedata
from typing import Literal

from qlora_cli.errors import DataError
from qlora_cli.tasks.pattern import Pattern, last_match
from qlora_cli.tasks.task import WrittenTask


class ExactMatch(WrittenTask):
    """The answer equals the reference, white space at both ends aside."""

    type: Literal["exact_match"] = "exact_match"
    pattern: Pattern | None = None
    """Regular expression for what of the answer is compared: its last match, or the first group of
    that. An answer without a match is wrong; a reference without one is compared whole."""
    ignore_case: bool = False
    """Capital and small letters are the same."""
    ignore_punctuation: bool = False
    """Punctuation does not count, in the sense of Unicode."""
    ignore_space: bool = False
    """Any run of white space is one space."""
    anywhere: bool = False
    """It is enough that the reference stands somewhere in the answer."""

    def score(self, reference: str, answer: str) -> float:
        """1.0 for a match, else 0.0."""
        found: str | None = answer
        if self.pattern is not None:
            found = last_match(self.pattern, answer)
            reference = last_match(self.pattern, reference) or reference
        expected = self._normal(reference)
        if reference and not expected:
            raise DataError(f"exact_match: nothing is left to compare of {reference[:80]!r}")
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
