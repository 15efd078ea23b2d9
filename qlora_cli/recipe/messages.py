"""Describe invalid recipe values: what was found, what is allowed, what to do next."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from collections.abc import Mapping as ReadOnlyDict
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import takewhile

from qlora_cli.common.config import Config, field_docs
from qlora_cli.common.formatting import shortened, value_text
from qlora_cli.recipe.field_types import FieldType, key_paths
from qlora_cli.recipe.other_tools import INSTEAD, OTHER_VALUES, TAKES
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

_DESCRIBED = (
    "missing",
    "extra_forbidden",
    "union_tag_not_found",
    "union_tag_invalid",
    "value_error",
)
"""pydantic's errors that have a description of their own; any other is a wrong value."""


@dataclass(frozen=True, slots=True)
class InvalidValue:
    """A value that pydantic refused, found in the tree."""

    path: KeyPath
    node: Node | None
    """None for a key that is missing."""
    expected: FieldType | None
    """None for a key that does not exist."""
    section: type[Config]
    """The section that the last key of `path` belongs to."""
    variants: ReadOnlyDict[str, type[Config]] = field(default_factory=dict)
    """The section and its alternatives, by `type`."""
    default: object = None
    kind: str = ""
    """pydantic's name for the error."""
    reason: str = ""


@dataclass(frozen=True)
class Explainer:
    """Turns refused values into problems."""

    root_class: type[Config]
    other_names: ReadOnlyDict[str, str]
    places: ReadOnlyDict[KeyPath, SourcePosition]
    unread: ReadOnlyDict[KeyPath, Sequence[SourcePosition]] = field(default_factory=dict)
    """Mappings with keys that could not be read (`<<`), and the places of their values."""

    def problems(self, errors: Sequence[InvalidValue]) -> list[Problem]:
        """Describe errors. Of a union, pydantic reports an error for each alternative it tried."""
        described = [error for error in errors if error.kind in _DESCRIBED]
        wrong = {error.path: error for error in errors if error.kind not in _DESCRIBED}
        explained = {error.path for error in described}
        # The alternative that fits the value best has got further: its errors are those to show.
        explained |= {path[:i] for path in (*explained, *wrong) for i in range(len(path))}
        found = [*described, *(error for path, error in wrong.items() if path not in explained)]
        found = [error for error in found if not self._follows_from_unread(error)]
        listing = self._listing(found)
        return [
            problem
            for error in found
            for problem in self._describe(error, lists_keys=error.path in listing)
        ]

    def _listing(self, errors: Sequence[InvalidValue]) -> set[KeyPath]:
        """Choose the unknown keys whose messages list the keys that there are: in each file, the
        first one of each kind of section."""
        first: dict[tuple[str, type[Config]], KeyPath] = {}
        unknown = [error for error in errors if error.kind == "extra_forbidden"]
        for error in sorted(unknown, key=lambda one: self._line_and_column(one.path)):
            first.setdefault((self.places[error.path].source, error.section), error.path)
        return set(first.values())

    def _line_and_column(self, path: KeyPath) -> tuple[int, int]:
        return self.places[path].line, self.places[path].column

    def _follows_from_unread(self, error: InvalidValue) -> bool:
        """Tell if an error is only about a key that could not be read, which is reported already:
        it lacks in its section, or its value has an anchor under a key of its own."""
        if error.kind == "extra_forbidden" and error.node is not None:
            merged = [place for places in self.unread.values() for place in places if place.line]
            return error.node.place in merged
        path = error.path[:-1] if error.kind == "missing" else error.path
        return error.kind in ("missing", "union_tag_not_found") and path in self.unread

    def _describe(self, error: InvalidValue, *, lists_keys: bool) -> list[Problem]:
        path, node = error.path, error.node
        if error.kind == "value_error":
            return [self._failed_check(path, line) for line in error.reason.splitlines()]
        if error.kind == "extra_forbidden":
            message = self._unknown_key(error, lists_keys=lists_keys)
            return [self._problem(self.places[path], path, message)]
        if error.kind in ("union_tag_not_found", "union_tag_invalid"):
            return [self._wrong_type(error)]
        assert error.expected is not None
        if node is None:
            about = field_docs(error.section).get(str(path[-1]), "").rstrip(".")
            message = f"is missing; it takes {error.expected.words()}"
            message += f": {about}" if about else ""
            return [self._problem(self.places[path[:-1]], path, message)]
        message = _wrong_value(node, error.expected, error.default)
        return [self._problem(node.place, path, message)]

    def _problem(self, place: SourcePosition, path: KeyPath, message: str) -> Problem:
        return Problem(place, f"{dotted(path)}: {message}")

    def _failed_check(self, path: KeyPath, message: str) -> Problem:
        """A check of a section has failed; its message names the fields that disagree."""
        while path not in self.places:
            path = path[:-1]
        by_name = {dotted(p).removeprefix(f"{dotted(path)}."): p for p in self.places}
        by_name |= {dotted(p): p for p in self.places}
        names = re.findall(r"[a-z_][\w.\[\]]*\w", message)
        place = next((self.places[by_name[n]] for n in names if n in by_name), self.places[path])
        prefix = "" if message.startswith(dotted(path)) else f"{dotted(path)}: "
        return Problem(place, prefix + message)

    def _wrong_type(self, error: InvalidValue) -> Problem:
        assert isinstance(error.node, Mapping)
        assert error.expected is not None
        variants, path = error.expected.variants, (*error.path, "type")
        takes = f"it takes one of {', '.join(variants)}"
        entry = error.node.entries.get("type")
        if entry is None:
            return self._problem(self.places[error.path], path, f"is missing; {takes}")
        message = f"found {_found(entry.node)}; {takes}{_did_you_mean(entry.node, variants)}"
        return self._problem(entry.node.place, path, message)

    def _unknown_key(self, error: InvalidValue, *, lists_keys: bool) -> str:
        key, section = str(error.path[-1]), error.section
        fields = section.model_fields
        owner = section.__name__ if "type" in fields else dotted(error.path[:-1]) or "a recipe"
        message = f'{owner} has no "{shortened(key)}"'
        if lists_keys:
            message += f"; it takes {', '.join(fields)}"
        if key in INSTEAD:
            return f"{message}; instead: {INSTEAD[key]}"
        takers = [name for name, other in error.variants.items() if key in other.model_fields]
        if takers:
            return f"{message}; {key} belongs to type {', '.join(takers)}"
        suggestions = self._suggestions(error)
        if not suggestions:
            return message
        takes = f" It takes {TAKES[key]}." if key in TAKES else ""
        return f"{message}; did you mean {' or '.join(suggestions)}?{takes}"

    def _suggestions(self, error: InvalidValue) -> list[str]:
        """Keys of ours for an unknown one: first by meaning, then elsewhere, then by spelling."""
        key, section = str(error.path[-1]), error.section
        name = self.other_names.get(key, key)
        here = list(section.model_fields)
        names = [step for step in error.path[:-1] if isinstance(step, str)]
        *above, last = name.split(".")
        if last in here and above in ([], names):
            return [f'"{last}"']
        # In the order of the recipe, each once: variants share many keys.
        paths = paths_of_key(name, key_paths(self.root_class))
        # `type` beside the path of a data source means the type of its format.
        shared = [_num_shared(path.split("."), names) for path in paths]
        elsewhere = [p for p, count in zip(paths, shared, strict=True) if count == max(shared)]
        close = [f'"{match}"' for match in get_close_matches(key, here, n=1)]
        # `training.steps` is rather "max_steps" than `training.spike.steps`.
        longer = [f'"{ours}"' for ours in here if name == key and ours.endswith(f"_{key}")]
        return [*longer, *elsewhere][:3] or close


def paths_of_key(name: str, paths: Iterable[str]) -> list[str]:
    """Return the paths that are a dotted name or end with it, each once."""
    return [path for path in dict.fromkeys(paths) if f".{path}".endswith(f".{name}")]


def _num_shared(names: Sequence[str], others: Sequence[str]) -> int:
    """Count the names that two dotted paths have in common at their beginning."""
    pairs = takewhile(lambda pair: pair[0] == pair[1], zip(names, others, strict=False))
    return sum(1 for _ in pairs)


def secret_message(kind: str) -> str:
    """Say that a value holds a secret, and where it belongs."""
    return (
        f"holds {kind}, and recipes are kept in run folders; take it out (a Hub token is read "
        "from $HF_TOKEN or `hf auth login`; download files that need a password first)"
    )


def _wrong_value(node: Node, expected: FieldType, default: object) -> str:
    message = f"found {_found(node)}; it takes {expected.words()}"
    if isinstance(node, Scalar) and (advice := _advice(node, expected)):
        return message + advice
    if isinstance(default, Config):
        return f"{message}; leave the key out for the defaults"
    is_example = isinstance(default, int | float | str) and not isinstance(default, bool)
    return f"{message}; for example {default}" if is_example and not expected.choices else message


def _advice(node: Scalar, expected: FieldType) -> str:
    if not node.plain and expected.accepts(node.text, plain=True):
        return "; the quotes make it text, so remove them"
    for name in (node.text, OTHER_VALUES.get(node.text, node.text)):
        if name in expected.variants:
            return f"; write {{type: {name}}}"
        if expected.item and name in expected.item.variants:
            return f"; write [{{type: {name}}}]"
    if expected.item and expected.item.accepts(node.text, plain=node.plain):
        return f"; write [{node.text}]"
    return _did_you_mean(node, expected.choices or expected.variants)


def _did_you_mean(node: Node, options: Collection[str]) -> str:
    if not isinstance(node, Scalar):
        return ""
    ours = OTHER_VALUES.get(node.text)
    close = [ours] if ours in options else get_close_matches(node.text, options, n=1)
    return "".join(f'; did you mean "{match}"?' for match in close)


def _found(node: Node) -> str:
    if isinstance(node, Items):
        return "a list"
    if isinstance(node, Mapping):
        return "a mapping"
    if node.is_null:
        return f"nothing ({node.text})" if node.text else "nothing"
    number = FieldType(scalars=(bool, int, float)).convert(node.text, plain=node.plain)
    is_infinite = node.plain and node.text.lstrip("+-").lower() in (".inf", ".nan")
    is_text = isinstance(number, str) and not is_infinite
    return value_text(node.text) if is_text else shortened(node.text)
