"""Compare the generated answer with the reference as JSON values."""

from __future__ import annotations

import json
from typing import Literal

from qlora_cli.common.formatting import value_text
from qlora_cli.errors import DataError
from qlora_cli.tasks.task import Task, after_reasoning


class JsonMatch(Task):
    """The answer is the same JSON value as the reference; key order and spacing do not count.

    Reasoning before the value is left out.
    """

    type: Literal["json_match"] = "json_match"

    def score(self, reference: str, answer: str) -> float:
        """Return 1.0 for a match, else 0.0.

        Raises:
            DataError: the reference is not JSON.
        """
        try:
            expected = _canonical(reference)
        except ValueError as error:  # a JSONDecodeError is one, and so is a number of 5,000 digits
            raise DataError(
                "evaluation.tasks: json_match needs JSON references; "
                f"found {value_text(reference)}",
                hint="use the task exact_match for plain text, and for tool calls that the chat "
                "template does not write as JSON alone",
            ) from error
        try:
            return float(_canonical(answer) == expected)
        except (ValueError, RecursionError):
            return 0.0


def _canonical(text: str) -> str:
    """Write a JSON value in one canonical way: 5.0 becomes 5.

    Comparing texts keeps true and 1 apart, which are equal in Python.
    """
    try:
        value = json.loads(text, parse_float=_number)
    except ValueError:
        value = json.loads(after_reasoning(text), parse_float=_number)
    return json.dumps(value, sort_keys=True)


def _number(text: str) -> float:
    number = float(text)
    return int(number) if number.is_integer() else number
