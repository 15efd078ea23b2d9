"""Is the generated answer the same JSON value as the reference?"""

from __future__ import annotations

import json
from typing import Literal

from qlora_cli.errors import DataError
from qlora_cli.tasks.task import WrittenTask


class JsonMatch(WrittenTask):
    """The answer parses as JSON and equals the reference: key order and spacing do not count."""

    type: Literal["json_match"] = "json_match"

    def score(self, reference: str, answer: str) -> float:
        """1.0 for a match, else 0.0.

        Raises:
            DataError: the reference itself is not JSON.
        """
        try:
            expected = json.loads(reference)
        except json.JSONDecodeError as error:
            raise DataError(
                f"evaluation.tasks: json_match needs JSON references; found {reference[:80]!r}",
                hint="use the task exact_match for plain text",
            ) from error
        try:
            # Python's True == 1, which in JSON are two different values.
            return float(
                json.dumps(json.loads(answer), sort_keys=True)
                == json.dumps(expected, sort_keys=True)
            )
        except (json.JSONDecodeError, RecursionError):
            return 0.0
