"""The values that a recipe key accepts: read from its field's annotation, described in words."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic.fields import FieldInfo

from qlora_cli.common.config import Config

Plain = str | int | float | bool

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
    if not re.fullmatch(rf"[-+]?{_DIGITS}", text):
        return int(value)
    # A float would round integers of more than 15 digits. Python refuses to read thousands of
    # digits, zeros in front included.
    digits = text.lstrip("+-").replace("_", "").lstrip("0") or "0"
    return -int(digits) if text.startswith("-") else int(digits)


_SCALARS: dict[type, tuple[str, Callable[[str], Plain | None]]] = {
    bool: ("true or false", _read_bool),
    int: ("a whole number", _read_int),
    float: ("a number", _read_float),
    str: ("text", str),
}
"""Description and parser of each, in the order of trying: for `int | str`, a plain 5 is an int."""

_BOUNDS = {
    annotated_types.Ge: ("at least", "ge"),
    annotated_types.Gt: ("above", "gt"),
    annotated_types.Le: ("at most", "le"),
    annotated_types.Lt: ("below", "lt"),
    annotated_types.MinLen: ("length at least", "min_length"),
    annotated_types.MaxLen: ("length at most", "max_length"),
}


@dataclass(frozen=True, slots=True)
class FieldType:
    """The alternatives that a field accepts. Several `sections` are told apart by their `type`.

    It describes and converts; pydantic alone decides whether a value is accepted.
    """

    choices: tuple[str, ...] = ()
    scalars: tuple[type, ...] = ()
    bounds: tuple[str, ...] = ()
    """In words: "at least 1"."""
    item: FieldType | None = None
    value: FieldType | None = None
    sections: tuple[type[Config], ...] = ()
    nullable: bool = False

    @classmethod
    def of(cls, field: FieldInfo) -> FieldType:
        """Describe a field of a `Config`."""
        return cls._of_annotation(field.annotation, field.metadata)

    @classmethod
    def _of_annotation(cls, annotation: Any, metadata: Iterable[Any] = ()) -> FieldType:
        members, inner = _members(annotation)
        by_origin = {get_origin(member) or member: member for member in members}
        return cls(
            choices=get_args(by_origin[Literal]) if Literal in by_origin else (),
            scalars=tuple(scalar for scalar in _SCALARS if scalar in by_origin),
            bounds=tuple(_bounds((*metadata, *inner))),
            item=cls._of_annotation(get_args(by_origin[list])[0]) if list in by_origin else None,
            value=cls._of_annotation(get_args(by_origin[dict])[1]) if dict in by_origin else None,
            sections=tuple(m for m in members if isinstance(m, type) and issubclass(m, Config)),
            nullable=NoneType in by_origin,
        )

    @property
    def variants(self) -> dict[str, type[Config]]:
        """The sections to choose from, by their `type`."""
        if len(self.sections) == 1:
            return {}
        return {name: section for section in self.sections for name in type_names(section)}

    @property
    def all_sections(self) -> tuple[type[Config], ...]:
        """The sections of the field itself and of its list items."""
        return (*self.sections, *(self.item.sections if self.item else ()))

    @property
    def is_union(self) -> bool:
        """True if pydantic tries several alternatives (null and `type` variants aside)."""
        alternatives = (bool(self.choices), *self.scalars, self.item, self.value, self.sections)
        return sum(map(bool, alternatives)) > 1

    def words(self) -> str:
        """The accepted values in words, such as `a whole number (at least 1), or null`."""
        words = [_SCALARS[scalar][0] for scalar in self.scalars]
        if self.choices:
            several = len(self.choices) > 1
            words.insert(0, f"{'one of ' if several else ''}{', '.join(self.choices)}")
        if self.item:
            words.append(f"a list (of {self.item.words()})")
        if self.value:
            words.append(f"a mapping (of names to {self.value.words()})")
        if self.variants:
            words.append(f"a section with a type, one of {', '.join(self.variants)}")
        elif self.sections:
            words.append(f"a section with the keys {', '.join(self.sections[0].model_fields)}")
        if self.bounds:
            words[-1] += f" ({', '.join(self.bounds)})"
        return ", or ".join([*words, *(["null"] if self.nullable else [])])

    def convert(self, text: str, *, plain: bool) -> Plain:
        """Return the value that `text` stands for here; the text itself if there is none.

        Quoted text (not `plain`) is never a number or a truth value.
        """
        if plain and text not in self.choices:
            for scalar in self.scalars:
                value = _SCALARS[scalar][1](text)
                if value is not None:
                    return value
        return text

    def accepts(self, text: str, *, plain: bool) -> bool:
        """Return whether `text` has the form of a value of this type (its bounds aside)."""
        value = self.convert(text, plain=plain)
        return value in self.choices or type(value) in self.scalars


def type_names(section: type[Config]) -> tuple[str, ...]:
    """The values of `type` that select a variant, its default first."""
    return get_args(section.model_fields["type"].annotation)


def key_paths(config_class: type[Config], prefix: str = "") -> Iterator[str]:
    """All keys below a config class, dotted, including those of all variants."""
    for name, info in config_class.model_fields.items():
        yield f"{prefix}{name}"
        for section in FieldType.of(info).sections:
            yield from key_paths(section, f"{prefix}{name}.")


def _members(annotation: Any) -> tuple[list[Any], list[Any]]:
    """The alternatives of a (nested, annotated) union, and all that annotates them."""
    if get_origin(annotation) is Annotated:
        inner, *metadata = get_args(annotation)
        members, below = _members(inner)
        return members, [*metadata, *below]
    if get_origin(annotation) not in (Union, UnionType):
        return [annotation], []
    found = [_members(member) for member in get_args(annotation)]
    return [m for members, _ in found for m in members], [m for _, below in found for m in below]


def _bounds(metadata: Iterable[Any]) -> Iterator[str]:
    for constraint in metadata:
        if isinstance(constraint, FieldInfo):
            yield from _bounds(constraint.metadata)
        elif type(constraint) in _BOUNDS:
            words, name = _BOUNDS[type(constraint)]
            yield f"{words} {getattr(constraint, name)}"
