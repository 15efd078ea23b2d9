"""From a YAML tree to a validated `Part`, with every problem found and the place of each."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from collections.abc import Mapping as ReadOnlyDict
from dataclasses import dataclass, field
from difflib import get_close_matches
from types import MappingProxyType
from typing import Generic, TypeVar

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from qlora_cli.common.config import Config, field_docs
from qlora_cli.common.secrets import find_secret
from qlora_cli.recipe.field_types import FieldType
from qlora_cli.recipe.yaml_parser import (
    Items,
    KeyPath,
    Mapping,
    Node,
    Problem,
    Scalar,
    SourcePosition,
    dotted,
)

ConfigT = TypeVar("ConfigT", bound=Config)

MAX_SHOWN = 60
"""Characters of a wrong value that a message repeats."""


@dataclass(frozen=True)
class Reading(Generic[ConfigT]):
    """A part, or the problems that prevent it; and where each value was written."""

    part: ConfigT | None
    problems: list[Problem]
    places: dict[KeyPath, SourcePosition]


def read_part(
    part_class: type[ConfigT], root: Mapping, *, other_names: ReadOnlyDict[str, str]
) -> Reading[ConfigT]:
    """Read the tree by the fields of `part_class`.

    Args:
        other_names: what other tools call our keys; used for "did you mean".
    """
    reader = _Reader(part_class, other_names)
    part = reader.section(root, part_class, ())
    return Reading(part if isinstance(part, part_class) else None, reader.problems, reader.places)


def key_paths(part_class: type[Config], prefix: str = "") -> Iterator[str]:
    """Every key below a part, dotted, those of all variants included."""
    for name, info in part_class.model_fields.items():
        yield f"{prefix}{name}"
        for part in FieldType.of(info).parts:
            yield from key_paths(part, f"{prefix}{name}.")


class _Refused:
    """Stands for a value whose problem is reported already: nothing is concluded from it."""


_REFUSED = _Refused()


@dataclass
class _Reader:
    root_class: type[Config]
    other_names: ReadOnlyDict[str, str]
    problems: list[Problem] = field(default_factory=list)
    places: dict[KeyPath, SourcePosition] = field(default_factory=dict)

    def section(
        self,
        node: Mapping,
        part_class: type[Config],
        path: KeyPath,
        variants: ReadOnlyDict[str, type[Config]] = MappingProxyType({}),
    ) -> Config | _Refused:
        self.places.setdefault(path, node.place)
        fields = part_class.model_fields
        values: dict[str, object] = {}
        for name, entry in node.entries.items():
            below = (*path, name)
            self.places[below] = entry.place
            if name in fields:
                values[name] = self._field(entry.node, fields[name], below)
            else:
                message = self._unknown_key(name, part_class, path, variants)
                values[name] = self._refuse(entry.place, below, message)
        for name, info in fields.items():
            if info.is_required() and name not in values:
                values[name] = self._missing(part_class, name, (*path, name))
        return _REFUSED if _REFUSED in values.values() else self._build(part_class, values, path)

    def _build(
        self, part_class: type[Config], values: dict[str, object], path: KeyPath
    ) -> Config | _Refused:
        try:
            return part_class.model_validate(values)
        except ValidationError as invalid:
            for details in invalid.errors(include_url=False):
                reason = details.get("ctx", {}).get("error", details["msg"])
                for line in str(reason).splitlines():
                    self._report_check(line, (*path, *details["loc"]))
            return _REFUSED

    def _report_check(self, message: str, path: KeyPath) -> None:
        """A check of our own models has failed; its message names the fields that disagree."""
        while path not in self.places:
            path = path[:-1]
        by_name = {dotted(p).removeprefix(f"{dotted(path)}."): p for p in self.places}
        by_name |= {dotted(p): p for p in self.places}
        names = re.findall(r"[a-z_][\w.\[\]]*\w", message)
        place = next((self.places[by_name[n]] for n in names if n in by_name), self.places[path])
        prefix = "" if message.startswith(dotted(path)) else f"{dotted(path)}: "
        self.problems.append(Problem(place, prefix + message))

    def _field(self, node: Node, info: FieldInfo, path: KeyPath) -> object:
        default = info.get_default(call_default_factory=True, validated_data={})
        return self._value(node, FieldType.of(info), path, default)

    def _value(
        self, node: Node, field_type: FieldType, path: KeyPath, default: object = None
    ) -> object:
        value: object = None
        if isinstance(node, Scalar):
            if node.is_null and field_type.nullable:
                return None
            if secret := find_secret(node.text):
                return self._refuse(node.place, path, _secret(secret))
            value = None if node.is_null else field_type.read(node.text, plain=node.plain)
        elif isinstance(node, Items) and field_type.item:
            value = self._list(node, field_type, field_type.item, path)
        elif isinstance(node, Mapping) and field_type.parts:
            value = self._part(node, field_type, path, default)
        elif isinstance(node, Mapping) and field_type.value:
            value = self._dict(node, field_type.value, path)
        if value is None:
            return self._refuse(node.place, path, _wrong_value(node, field_type, default))
        return value

    def _list(
        self, node: Items, field_type: FieldType, item_type: FieldType, path: KeyPath
    ) -> object:
        self.places.update({(*path, i): item.place for i, item in enumerate(node.nodes)})
        values = [self._value(item, item_type, (*path, i)) for i, item in enumerate(node.nodes)]
        if _REFUSED in values:
            return _REFUSED
        return values if field_type.within_bounds(values) else None

    def _dict(self, node: Mapping, value_type: FieldType, path: KeyPath) -> object:
        values = {}
        for name, entry in node.entries.items():
            self.places[(*path, name)] = entry.place
            values[name] = self._value(entry.node, value_type, (*path, name))
        return _REFUSED if _REFUSED in values.values() else values

    def _part(
        self, node: Mapping, field_type: FieldType, path: KeyPath, default: object
    ) -> Config | _Refused:
        variants = field_type.variants
        if not variants:
            return self.section(node, field_type.parts[0], path)
        entry = node.entries.get("type")
        if entry is None and isinstance(default, Config) and not node.place.line:
            # No file has this section: an override completes the one that stands by default.
            return self.section(node, type(default), path, variants)
        below = (*path, "type")
        if entry is None:
            message = f"is missing; it takes one of {', '.join(variants)}"
            return self._refuse(self.places.get(path, node.place), below, message)
        if not isinstance(entry.node, Scalar) or entry.node.text not in variants:
            message = f"found {_found(entry.node)}; it takes one of {', '.join(variants)}"
            message += _did_you_mean(entry.node, variants)
            return self._refuse(entry.node.place, below, message)
        return self.section(node, variants[entry.node.text], path, variants)

    def _missing(self, part_class: type[Config], name: str, path: KeyPath) -> _Refused:
        words = FieldType.of(part_class.model_fields[name]).words()
        about = field_docs(part_class).get(name, "").rstrip(".")
        message = f"is missing; it takes {words}" + (f": {about}" if about else "")
        return self._refuse(self.places[path[:-1]], path, message)

    def _refuse(self, place: SourcePosition, path: KeyPath, message: str) -> _Refused:
        self.problems.append(Problem(place, f"{dotted(path)}: {message}"))
        return _REFUSED

    def _unknown_key(
        self,
        key: str,
        part_class: type[Config],
        path: KeyPath,
        variants: ReadOnlyDict[str, type[Config]],
    ) -> str:
        fields = part_class.model_fields
        owner = part_class.__name__ if "type" in fields else dotted(path) or "a recipe"
        message = f'{owner} has no "{_shortened(key)}"; it takes {", ".join(fields)}'
        takers = [name for name, part in variants.items() if key in part.model_fields]
        if takers:
            return f"{message}; {key} belongs to type {', '.join(takers)}"
        suggestions = self._suggestions(key, part_class)
        return f"{message}; did you mean {' or '.join(suggestions)}?" if suggestions else message

    def _suggestions(self, key: str, part_class: type[Config]) -> list[str]:
        """Keys of ours for an unknown one: first by meaning, then elsewhere, then by spelling."""
        name = self.other_names.get(key, key)
        here = list(part_class.model_fields)
        if name in here:
            return [f'"{name}"']
        # In the order of the recipe, each once: variants share many keys.
        paths = dict.fromkeys(key_paths(self.root_class))
        elsewhere = [p for p in paths if p == name or p.endswith(f".{name}")]
        close = [f'"{match}"' for match in get_close_matches(key, here, n=1)]
        return elsewhere[:3] or close


def _secret(kind: str) -> str:
    return (
        f"holds {kind}, and recipes are kept in the folders of runs; take it out (a token for the "
        "hub is read from $HF_TOKEN or `hf auth login`, and files from where they were downloaded)"
    )


def _wrong_value(node: Node, field_type: FieldType, default: object) -> str:
    message = f"found {_found(node)}; it takes {field_type.words()}"
    if isinstance(node, Scalar) and (advice := _advice(node, field_type)):
        return message + advice
    if isinstance(default, Config):
        return f"{message}; leave the key out for the defaults"
    is_example = isinstance(default, int | float | str) and not isinstance(default, bool)
    return f"{message}; for example {default}" if is_example and not field_type.choices else message


def _advice(node: Scalar, field_type: FieldType) -> str:
    if not node.plain and field_type.read(node.text, plain=True) is not None:
        return "; the quotes make it text, so remove them"
    if node.text in field_type.variants:
        return f"; write {{type: {node.text}}}"
    if field_type.item and node.text in field_type.item.variants:
        return f"; write [{{type: {node.text}}}]"
    if field_type.item and field_type.item.read(node.text, plain=node.plain) is not None:
        return f"; write [{node.text}]"
    return _did_you_mean(node, field_type.choices or field_type.variants)


def _did_you_mean(node: Node, options: Iterable[str]) -> str:
    close = get_close_matches(node.text, options, n=1) if isinstance(node, Scalar) else ()
    return "".join(f'; did you mean "{match}"?' for match in close)


def _found(node: Node) -> str:
    if isinstance(node, Items):
        return "a list"
    if isinstance(node, Mapping):
        return "a mapping"
    if node.is_null:
        return f"nothing ({node.text})" if node.text else "nothing"
    text = _shortened(node.text)
    return text if node.plain else f'"{text}"'


def _shortened(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= MAX_SHOWN else f"{line[:MAX_SHOWN]}..."
