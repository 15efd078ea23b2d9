"""The base of every report that a command returns, and prints with `--json`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from enum import Enum
from typing import Any, Final, Literal

from qlora_cli.common.docstrings import attribute_docs


class _Absent(Enum):
    ABSENT = "absent"


Absent = Literal[_Absent.ABSENT]
ABSENT: Final = _Absent.ABSENT
"""Value of a field whose key is left out of the JSON."""


class Report:
    """A frozen dataclass of figures. Each field is a key of the JSON; its docstring documents it.

    Subclass it as `@dataclass(frozen=True, slots=True)`. Fields may hold other reports, lists and
    mappings of them. A field whose value is `ABSENT` is left out. A trailing underscore is not part
    of the key: `from_` is `from`.
    """

    __slots__ = ()

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values, keys in the order of the fields."""
        values = {key_of(name): getattr(self, name) for name in field_names(type(self))}
        return {key: to_json(value) for key, value in values.items() if value is not ABSENT}


def to_json(value: Any) -> Any:
    """Return a value with every report inside it as JSON values."""
    if isinstance(value, Report):
        return value.to_json()
    if isinstance(value, Mapping):
        return {key: to_json(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(one) for one in value]
    return value


def field_names(report: type[Report]) -> list[str]:
    """Return the names of a report's fields, in order."""
    dataclass: Any = report
    return [field.name for field in dataclasses.fields(dataclass)]


def key_of(name: str) -> str:
    """Return the JSON key of a field."""
    return name.removesuffix("_")


def report_docs(report: type[Report]) -> dict[str, str]:
    """Return the documentation of each field."""
    docs = attribute_docs(report, Report)
    return {name: docs.get(name, "") for name in field_names(report)}
