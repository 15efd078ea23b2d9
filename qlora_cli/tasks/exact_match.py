"""Does the generated answer equal the reference, as text?"""

from __future__ import annotations

from typing import Literal

from qlora_cli.tasks.task import WrittenTask


class ExactMatch(WrittenTask):
    """The answer equals the reference, white space at both ends aside."""

    type: Literal["exact_match"] = "exact_match"

    def score(self, reference: str, answer: str) -> float:
        """1.0 for a match, else 0.0."""
        return float(answer.strip() == reference.strip())
