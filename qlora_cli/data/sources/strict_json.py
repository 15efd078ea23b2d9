"""Parse JSON of data files strictly: duplicate keys, NaN and deep nesting are a ValueError."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from qlora_cli.types import Row

_MAX_DEPTH = 100
_MAX_DIGITS = 4300
"""Digits of a whole number that Python reads."""


class _LongNumber(int):
    """Stands for a whole number of more digits than Python reads; its value is their number."""


def _read_int(text: str) -> int:
    return _LongNumber(len(text)) if len(text) > _MAX_DIGITS else int(text)


def _long_number(value: object) -> _LongNumber | None:
    """Return a number that is too long, or the first of a list."""
    if isinstance(value, list):
        return next(filter(None, map(_long_number, value)), None)
    return value if isinstance(value, _LongNumber) else None


def _unique(pairs: list[tuple[str, Any]]) -> Row:
    """Make an object. Of two values with one key, Python would silently keep the last."""
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} is in one object twice")
    for name, value in pairs:
        if (long := _long_number(value)) is not None:
            raise ValueError(
                f"the field {name!r} has a number of {int(long):,} digits, and {_MAX_DIGITS:,} can "
                "be read; put it in quotes if it is text"
            )
    return row


def _refuse_constant(name: str) -> None:
    raise ValueError(f"not JSON: {name} is not a JSON number")


_DECODER = json.JSONDecoder(
    object_pairs_hook=_unique, parse_constant=_refuse_constant, parse_int=_read_int
)


def parse(text: str) -> Any:
    """Parse a JSON value; any problem in the text is a ValueError."""
    if text.startswith("\ufeff"):
        raise ValueError("not JSON: a byte order mark before it (from files that were joined?)")
    start = skip_space(text, 0)
    value, end = _decode(text, start)
    if (after := skip_space(text, end)) != len(text):
        raise json.JSONDecodeError("Extra data", text, after)
    return value


def _decode(text: str, at: int) -> tuple[Any, int]:
    """Parse the JSON value that begins at a place; return it and its end."""
    try:
        value, end = _DECODER.raw_decode(text, at)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if text.count("[", at, end) + text.count("{", at, end) > _MAX_DEPTH and _is_deep(value):
        raise ValueError("nested too deeply")
    return value, end


def _is_deep(value: Any) -> bool:
    """Return True if values are nested deeper than `_MAX_DEPTH`; Python handles a few hundred."""
    level = [value]
    for _ in range(_MAX_DEPTH):
        inside = [item for item in level if isinstance(item, (list, dict))]
        if not inside:
            return False
        level = [
            below
            for item in inside
            for below in (item.values() if isinstance(item, dict) else item)
        ]
    return True


def not_json(error: json.JSONDecodeError) -> str:
    """Describe what is wrong in one line."""
    return f"not JSON: {error.msg} (column {error.colno})"


def as_object(value: object) -> Row:
    """Return the value if it is an object; else raise ValueError."""
    if not isinstance(value, dict):
        found = "null" if value is None else type(value).__name__
        raise ValueError(f"expected an object, found {found}")
    return value


def only_list(row: Row) -> list[Any]:
    """Return the only list in an object."""
    lists = [item for item in row.values() if isinstance(item, list)]
    if len(lists) != 1:
        raise ValueError(
            f"expected a list of objects, or an object with one list; found {len(lists)} lists"
        )
    return lists[0]


def list_items(text: str, at: int) -> Iterator[tuple[int, Any]]:
    """Yield the items of the list that begins at `at`, each with its place."""
    at = skip_space(text, at + 1)
    is_open = text[at : at + 1] != "]"
    while is_open:
        value, end = _decode(text, at)
        yield at, value
        at = skip_space(text, end)
        is_open = text[at : at + 1] == ","
        if is_open:
            at = skip_space(text, at + 1)
        elif text[at : at + 1] != "]":
            raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
    after = skip_space(text, at + 1)
    if after != len(text):
        raise json.JSONDecodeError("Extra data", text, after)


def skip_space(text: str, at: int) -> int:
    """Return the place of the next character from `at` on that is not white space."""
    while text[at : at + 1] in (" ", "\t", "\n", "\r"):
        at += 1
    return at
