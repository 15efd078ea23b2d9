"""What a key of a recipe takes: read from the type of its field, said in plain words."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic.fields import FieldInfo

from qlora_cli.common.config import Config

Plain = str | int | float | bool


@dataclass(frozen=True, slots=True)
class Bound:
    """A limit on a number, or on the length of a list or text."""

    words: str
    limit: float
    holds: Callable[[Any, Any], bool]

    def __str__(self) -> str:
        return f"{self.words} {self.limit}"


_DIGITS = r"[0-9]+(?:_[0-9]+)*"
_NUMBER = re.compile(rf"[-+]?(?:{_DIGITS}(?:\.(?:{_DIGITS})?)?|\.{_DIGITS})(?:[eE][-+]?[0-9]+)?")
_TRUTH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def _read_bool(text: str) -> bool | None:
    return _TRUTH.get(text.lower()) if text in (text.lower(), text.title(), text.upper()) else None


def _read_float(text: str) -> float | None:
    value = float(text) if _NUMBER.fullmatch(text) else math.inf
    return value if math.isfinite(value) else None


def _read_int(text: str) -> int | None:
    value = _read_float(text)
    if value is None or not value.is_integer():
        return None
    # A float would round what has more than 15 digits.
    return int(text) if re.fullmatch(rf"[-+]?{_DIGITS}", text) else int(value)


_SCALARS: dict[type, tuple[str, Callable[[str], Plain | None]]] = {
    bool: ("true or false", _read_bool),
    int: ("a whole number", _read_int),
    float: ("a number", _read_float),
    str: ("text", str),
}
"""Words and reader of each, in the order of trying: for `int | str`, a plain 5 is a number."""


@dataclass(frozen=True, slots=True)
class FieldType:
    """The alternatives that a field offers. Several `parts` are told apart by their `type`."""

    choices: tuple[str, ...]
    scalars: tuple[type, ...]
    bounds: tuple[Bound, ...]
    item: FieldType | None
    value: FieldType | None
    parts: tuple[type[Config], ...]
    nullable: bool

    @classmethod
    def of(cls, field: FieldInfo) -> FieldType:
        """The type of a field of a `Part`."""
        return cls._of_annotation(field.annotation, field.metadata)

    @classmethod
    def _of_annotation(cls, annotation: Any, metadata: Iterable[Any] = ()) -> FieldType:
        members = list(_members(annotation))
        by_origin = {get_origin(member) or member: member for member in members}
        has_metadata = get_origin(annotation) is Annotated
        inner = annotation.__metadata__ if has_metadata else ()
        return cls(
            choices=get_args(by_origin[Literal]) if Literal in by_origin else (),
            scalars=tuple(scalar for scalar in _SCALARS if scalar in by_origin),
            bounds=tuple(_bounds((*metadata, *inner))),
            item=cls._of_annotation(get_args(by_origin[list])[0]) if list in by_origin else None,
            value=cls._of_annotation(get_args(by_origin[dict])[1]) if dict in by_origin else None,
            parts=tuple(m for m in members if isinstance(m, type) and issubclass(m, Config)),
            nullable=NoneType in by_origin,
        )

    @property
    def variants(self) -> dict[str, type[Config]]:
        """The sections to choose from, by their `type`."""
        return {part_type(part): part for part in self.parts} if len(self.parts) > 1 else {}

    def words(self) -> str:
        """What is allowed, such as `a whole number (at least 1), or null`."""
        words = [_SCALARS[scalar][0] for scalar in self.scalars]
        if self.choices:
            several = len(self.choices) > 1
            words.insert(0, f"{'one of ' if several else ''}{', '.join(self.choices)}")
        if self.item:
            words.append(f"a list (of {self.item.words()})")
        if self.value:
            words.append(f"a mapping (of names to {self.value.words()})")
        if self.parts:
            words.append(self._section_words())
        if self.bounds:
            words[-1] += f" ({', '.join(map(str, self.bounds))})"
        return ", or ".join([*words, *(["null"] if self.nullable else [])])

    def _section_words(self) -> str:
        if self.variants:
            return f"a section with a type, one of {', '.join(self.variants)}"
        return f"a section with the keys {', '.join(self.parts[0].model_fields)}"

    def read(self, text: str, *, plain: bool) -> Plain | None:
        """The value that `text` stands for here; None if the field takes no such value.

        Quoted text (not `plain`) is never a number or a truth value.
        """
        if text in self.choices:
            return text
        for scalar in self.scalars:
            value = _SCALARS[scalar][1](text) if plain or scalar is str else None
            if value is not None:
                return value if self.within_bounds(value) else None
        return None

    def within_bounds(self, value: object) -> bool:
        return all(bound.holds(value, bound.limit) for bound in self.bounds)


def part_type(part: type[Config]) -> str:
    """The `type` that selects a variant."""
    name: str = part.model_fields["type"].default
    return name


def _members(annotation: Any) -> Iterator[Any]:
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from _members(get_args(annotation)[0])
    elif origin in (Union, UnionType):
        for member in get_args(annotation):
            yield from _members(member)
    else:
        yield annotation


def _longer(value: Any, limit: int) -> bool:
    return len(value) >= limit


def _shorter(value: Any, limit: int) -> bool:
    return len(value) <= limit


_BOUNDS = {
    annotated_types.Ge: ("at least", "ge", operator.ge),
    annotated_types.Gt: ("above", "gt", operator.gt),
    annotated_types.Le: ("at most", "le", operator.le),
    annotated_types.Lt: ("below", "lt", operator.lt),
    annotated_types.MinLen: ("length at least", "min_length", _longer),
    annotated_types.MaxLen: ("length at most", "max_length", _shorter),
}


def _bounds(metadata: Iterable[Any]) -> Iterator[Bound]:
    for constraint in metadata:
        if isinstance(constraint, FieldInfo):
            yield from _bounds(constraint.metadata)
        elif type(constraint) in _BOUNDS:
            words, name, holds = _BOUNDS[type(constraint)]
            yield Bound(words, getattr(constraint, name), holds)
