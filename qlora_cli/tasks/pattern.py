"""Regular expressions that extract the relevant part of an answer."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Annotated

from pydantic import AfterValidator


def _checked(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error
    return pattern


AnswerPattern = Annotated[str, AfterValidator(_checked)]


@lru_cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern, re.MULTILINE)


def last_match(pattern: str, text: str) -> str | None:
    """Return the last match, or its first group if the pattern has one; None without a match."""
    found = list(_compiled(pattern).finditer(text))
    return found[-1][min(1, _compiled(pattern).groups)] if found else None
