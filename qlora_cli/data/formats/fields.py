"""Read one field of a row. Any problem is a DataError that names the field's path."""

from __future__ import annotations

import json
from collections.abc import Mapping
from difflib import get_close_matches
from functools import lru_cache
from typing import Any

from qlora_cli.common.formatting import first_names
from qlora_cli.errors import DataError
from qlora_cli.types import Row

_NAMED = 20
"""Fields of a row named in an error."""
_LONGEST = 60
"""Characters of a value or of a name in an error."""


def value_of(values: Mapping[str, Any], field: str, where: str = "") -> Any:
    """Return the value of a field, which must exist."""
    if field not in values:
        raise DataError(f"field '{path_of(where, field)}': {missing(field, values)}")
    return values[field]


def missing(field: str, values: Mapping[str, Any]) -> str:
    """Say that a field is missing, and what was found instead: the first names, the similar one."""
    return _missing(field, tuple(values))


# All rows of a table have the same columns, and a search among many takes milliseconds.
@lru_cache(maxsize=64)
def _missing(field: str, names: tuple[str, ...]) -> str:
    shown = first_names([repr(_shortened(name)) for name in names], _NAMED)
    simple = {" ".join(name.lower().split()): name for name in reversed(names)}
    near = get_close_matches(" ".join(field.lower().split()), simple, n=1)
    meant = f"; did you mean {simple[near[0]]!r}?" if near else ""
    return f"missing; found {shown or 'nothing'}{meant}"


def _shortened(name: str) -> str:
    return name if len(name) <= _LONGEST else f"{name[:_LONGEST]}..."


def text_of(
    values: Mapping[str, Any], field: str, where: str = "", *, may_be_empty: bool = False
) -> str:
    """Return the text in a field."""
    return as_text(value_of(values, field, where), path_of(where, field), may_be_empty=may_be_empty)


def as_text(value: object, path: str, *, may_be_empty: bool = False) -> str:
    """Return a value that must be text."""
    if not isinstance(value, str):
        raise DataError(f"field '{path}': got {shown(value)}, expected text")
    if not may_be_empty and not value.strip():
        raise DataError(f"field '{path}': empty")
    # Tokenizers, terminals and other programs end a text at NUL.
    if (at := value.find("\0")) >= 0:
        raise DataError(f"field '{path}': character {at + 1} is NUL (\\u0000), which is not text")
    try:
        # JSON may hold half a surrogate pair ("\ud83d"), which no tokenizer takes.
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"field '{path}': character {error.start + 1} is half of a surrogate pair "
            f"({value[error.start]!r}), which is not text"
        ) from error
    return value


def list_of(values: Mapping[str, Any], field: str, where: str = "") -> list[tuple[str, Any]]:
    """Return the entries of a list of messages, each with its path in the row: `messages[2]`."""
    path = path_of(where, field)
    return as_list(value_of(values, field, where), path, "a list of messages")


def as_list(value: object, path: str, expected: str) -> list[tuple[str, Any]]:
    """Return the entries of a value that must be a list, each with its path."""
    if not isinstance(value, list):
        kind = "JSON text " if isinstance(value, str) and value.lstrip().startswith("[") else ""
        raise DataError(f"field '{path}': got {kind}{shown(value)}, expected {expected}")
    return [(f"{path}[{i}]", entry) for i, entry in enumerate(value)]


def as_object(value: object, path: str) -> Mapping[str, Any]:
    """Return a value that must be an object."""
    if not isinstance(value, Mapping):
        raise DataError(f"field '{path}': got {shown(value)}, expected an object")
    return value


def parsed(value: object, path: str) -> Any:
    """Return a value that may also be given as JSON text, as in tables."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"field '{path}': got {shown(value)}, which is not JSON: {error}"
        ) from error


def is_given(values: Mapping[str, Any], field: str) -> bool:
    """Tell if the field holds anything; tables hold null or an empty list in each row."""
    return values.get(field) not in (None, "", [], {}, "[]", "{}")


def refuse(values: Mapping[str, Any], *fields: str, where: str = "") -> None:
    """Raises DataError if a field holds something that this format would leave out."""
    for field in fields:
        if is_given(values, field):
            raise DataError(
                f"field '{path_of(where, field)}': got {shown(values[field])}, which this format "
                "does not read; leaving it out would change what is trained on"
            )


def optional_text(row: Row, field: str) -> str | None:
    """The text that the field holds, if it holds anything."""
    return text_of(row, field) if is_given(row, field) else None


def path_of(where: str, field: str) -> str:
    """Return the path of a field: `messages[2].role`."""
    return f"{where}.{field}" if where else field


def shown(value: object) -> str:
    """Format a value for an error: shortened, with its type unless it is text."""
    text = repr(value)
    text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
    if value is None:
        return "null"
    return text if isinstance(value, str) else f"{text} ({type(value).__name__})"
