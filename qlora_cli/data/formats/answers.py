"""Split conversations into a prompt and an answer, and read prompts and numbers of a row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from qlora_cli.data.formats.fields import is_given, optional_text, shown, text_of
from qlora_cli.data.formats.turns import check_order, messages_of
from qlora_cli.errors import DataError
from qlora_cli.types import Message, Row

PROMPTS = ("prompt", "conversations", "messages")
"""Columns that may hold a prompt."""
_AROUND = 20
"""Characters shown on each side of the first difference of two texts."""


def read_prompt(row: Row, field: str | None) -> list[Message]:
    """Read the prompt of a row; [] if it has none. None of its turns is supervised.

    The column `input` belongs to the column `instruction`, as in the format `alpaca`.

    Args:
        field: its column; None takes the one of `PROMPTS` that is given.

    Raises:
        DataError: it is not a prompt, or there are two.
    """
    found = [field] if field else [name for name in PROMPTS if row.get(name) is not None]
    if len(found) > 1:
        raise DataError(f"field '{found[1]}': '{found[0]}' has a prompt too")
    if not found:
        return []
    if found[0] == "instruction" and is_given(row, "input"):
        request = f"{text_of(row, 'instruction')}\n\n{text_of(row, 'input')}"
        return [Message("user", request, train=False)]
    return not_supervised(messages_of(row, found[0], "user"))


def not_supervised(messages: Sequence[Message]) -> list[Message]:
    """Return messages of a prompt, whatever a row says about training on them."""
    return [replace(message, train=False, is_marked=False) for message in messages]


def with_system(row: Row, messages: list[Message]) -> list[Message]:
    """Put the text of the column `system`, if it is given, before a prompt."""
    system = optional_text(row, "system")
    return messages if system is None else [Message("system", system, train=False), *messages]


def answer_start(messages: Sequence[Message]) -> int:
    """Return the index of the first message after the last one of the user or the system."""
    asking = [i for i, message in enumerate(messages) if message.role in ("user", "system")]
    return asking[-1] + 1 if asking else 0


def is_whole(messages: Sequence[Message]) -> bool:
    """Tell if messages are a conversation with its beginning, and not only an answer."""
    return messages[0].role in ("user", "system")


def supervise_last(messages: list[Message], field: str) -> list[Message]:
    """Return a whole conversation of which only the last answer is supervised.

    Raises:
        DataError: their order is not valid, or there is no prompt or no answer.
    """
    start = answer_start(messages)
    checked = check_order([*not_supervised(messages[:start]), *messages[start:]], field)
    if not any(message.role == "user" for message in checked):
        raise DataError(f"field '{field}': no user message before the answer")
    return checked


def difference(one: Message, other: Message, place: str = "") -> str | None:
    """Say how two messages differ, the first one's value first; None if they are alike.

    Args:
        place: where the other one is.
    """
    if one.content != other.content and one.role == other.role:
        pairs = zip(one.content, other.content, strict=False)
        shorter = min(len(one.content), len(other.content))
        at = next((i for i, (a, b) in enumerate(pairs) if a != b), shorter)
        parts = [message.content[max(0, at - _AROUND) : at + _AROUND] for message in (one, other)]
        return f"{parts[0]!r}, where {place} has {parts[1]!r} (at character {at + 1})"
    for name in ("role", "reasoning", "tool_calls", "name", "tool_call_id"):
        found, expected = getattr(one, name), getattr(other, name)
        if found != expected:
            return f"{name} {shown(found)}, where {place} has {shown(expected)}"
    return None


def number_of(row: Row, field: str) -> float | None:
    """Return the number in a column, also written as text as in a csv file; None if not given.

    Raises:
        DataError: it is something else, or not finite.
    """
    if not is_given(row, field):
        return None
    value = row[field]
    try:
        # True and False are numbers in Python.
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise DataError(f"field '{field}': got {shown(value)}, expected a number")
    return number


def truth_of(row: Row, field: str) -> bool | None:
    """Return True or False for a column that holds it, also as 1 or 0, or as text; else None."""
    value = row.get(field)
    if isinstance(value, str):
        return _TRUTHS.get(value.strip().lower())
    if isinstance(value, bool | int | float) and value in (0, 1):
        return bool(value)
    return None


_TRUTHS: dict[str, Literal[True, False]] = {"true": True, "1": True, "false": False, "0": False}
