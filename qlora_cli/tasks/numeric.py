"""Compare the last number of the generated answer with that of the reference."""

from __future__ import annotations

from decimal import Decimal
from typing import Literal

from pydantic import Field

from qlora_cli.common.formatting import value_text
from qlora_cli.errors import DataError
from qlora_cli.tasks.pattern import AnswerPattern, last_match
from qlora_cli.tasks.task import Task

# A minus is a sign unless it follows something to subtract from.
_SIGN = r"(?:(?<![\w)])[-−][$€£]?)?"
_WHOLE = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
_NUMBER = rf"({_SIGN}(?:{_WHOLE}(?:\.\d+)?|(?<!\d)\.\d+))"


class Numeric(Task):
    """The last number of the answer equals the last number of the reference, as in GSM8K.

    `1,234.50`, `$1234.5` and `1234.5` are the same number.
    """

    type: Literal["numeric"] = "numeric"
    pattern: AnswerPattern | None = None
    """Regular expression that finds the number, such as `#### (.+)`; an answer without a match is
    wrong. null searches the whole answer."""
    tolerance: float = Field(0.0, ge=0)
    """Maximum difference that counts as equal."""

    def score(self, reference: str, answer: str) -> float:
        """Return 1.0 for the same number, else 0.0."""
        # A reference may consist of the number only.
        expected = last_number(self._marked(reference) or reference)
        if expected is None:
            raise DataError(
                f"numeric needs a number in each reference; found {value_text(reference)}",
                hint="use the task exact_match for plain text",
            )
        found = last_number(self._marked(answer) or "")
        return float(found is not None and abs(found - expected) <= Decimal(str(self.tolerance)))

    def _marked(self, text: str) -> str | None:
        return text if self.pattern is None else last_match(self.pattern, text)


def last_number(text: str) -> Decimal | None:
    """Find the last number in a text, with or without commas between thousands."""
    found = last_match(_NUMBER, text)
    if found is None:
        return None
    return Decimal(found.replace("−", "-").translate({ord(sign): None for sign in ",$€£"}))
