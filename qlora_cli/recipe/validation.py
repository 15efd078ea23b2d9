"""Validate a YAML tree with pydantic; report every problem in our words, with its place.

The tree is converted to plain values by the types of the fields (`2e-4` is a number where one is
expected, `no` is text where text is expected). pydantic then checks all of them, strictly.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Mapping as ReadOnlyDict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Generic, TypeVar

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from qlora_cli.common.config import Config
from qlora_cli.common.secrets import find_secret
from qlora_cli.recipe.field_types import FieldType, type_names
from qlora_cli.recipe.messages import Explainer, InvalidValue, secret_message
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

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

ConfigT = TypeVar("ConfigT", bound=Config)

_UNKNOWN = FieldType(scalars=(str,))
"""The type of everything below a key that does not exist."""


@dataclass(frozen=True)
class ValidationResult(Generic[ConfigT]):
    """A config, or the problems that prevent it; and the place of each value."""

    config: ConfigT | None
    problems: list[Problem]
    places: dict[KeyPath, SourcePosition]


def validate_tree(
    config_class: type[ConfigT], root: Mapping, *, other_names: ReadOnlyDict[str, str]
) -> ValidationResult[ConfigT]:
    """Build a config from a tree.

    Args:
        other_names: other tools' names for our keys; used for "did you mean".
    """
    expected = FieldType(sections=(config_class,))
    places = {(): root.place, **dict(_places(root, ()))}
    secrets = dict(_secrets(root, ()))
    config, others = None, []
    try:
        config = config_class.model_validate(_plain(root, expected), strict=True)
    except ValidationError as invalid:
        start = InvalidValue((), root, expected, config_class)
        found = [
            replace(_locate(start, error["loc"]), kind=error["type"], reason=_reason(error))
            for error in invalid.errors(include_url=False, include_input=False)
        ]
        explainer = Explainer(config_class, other_names, places, dict(_unread(root, ())))
        others = explainer.problems([one for one in found if one.path not in secrets])
    problems = [*secrets.values(), *others]
    return ValidationResult(None if problems else config, problems, places)


def _reason(error: ErrorDetails) -> str:
    """The text of a check that is ours; pydantic's own words for anything else."""
    return str(error.get("ctx", {}).get("error", error["msg"]))


def _plain(node: Node, expected: FieldType, default: object = None) -> object:
    """The value of a node, for pydantic. What does not fit the type is passed on unchanged."""
    if isinstance(node, Scalar):
        return None if node.is_null else expected.convert(node.text, plain=node.plain)
    if isinstance(node, Items):
        return [_plain(item, expected.item or _UNKNOWN) for item in node.nodes]
    values: dict[str, object] = {}
    section = _section(node, expected)
    if section is None and "type" not in node.entries and not node.place.line:
        # No file has this section: an override of one of its keys completes the default one.
        section = type(default) if isinstance(default, Config) else None
        values |= {"type": type_names(section)[0]} if section else {}
    for name, entry in node.entries.items():
        info = section.model_fields.get(name) if section else None
        if info is None:
            values[name] = _plain(entry.node, expected.value or _UNKNOWN)
        else:
            values[name] = _plain(entry.node, FieldType.of(info), _default(info))
    return values


def _section(node: Mapping, expected: FieldType) -> type[Config] | None:
    """The section that a mapping fills: the only one, or the one that its `type` names."""
    if not expected.variants:
        return expected.sections[0] if expected.sections else None
    entry = node.entries.get("type")
    if entry is None or not isinstance(entry.node, Scalar):
        return None
    return expected.variants.get(entry.node.text)


def _locate(at: InvalidValue, steps: tuple[int | str, ...]) -> InvalidValue:
    """Follow the location of a pydantic error down the tree.

    Args:
        steps: keys and list positions. Names of variants and of alternatives, which the tree does
            not have, stand in between.
    """
    node, expected = at.node, at.expected
    assert expected is not None
    if expected.is_union:
        steps = steps[1:]
    if isinstance(node, Mapping) and expected.variants and steps:
        section, steps = expected.variants[str(steps[0])], steps[1:]
    elif expected.sections:
        section = expected.sections[0]
    if not steps:
        return at
    step, rest = steps[0], steps[1:]
    path = (*at.path, step)
    if isinstance(node, Items) and expected.item and isinstance(step, int):
        item = replace(at, path=path, node=node.nodes[step], expected=expected.item, default=None)
        return _locate(item, rest)
    if not isinstance(node, Mapping):
        return at
    entry = node.entries.get(str(step))
    below = replace(at, path=path, node=entry.node if entry else None)
    if expected.value:
        return _locate(replace(below, expected=expected.value, default=None), rest)
    info = section.model_fields.get(str(step))
    below = replace(below, section=section, variants=expected.variants, expected=None)
    if info is None:
        return below
    return _locate(replace(below, expected=FieldType.of(info), default=_default(info)), rest)


def _default(info: FieldInfo) -> object:
    return info.get_default(call_default_factory=True, validated_data={})


def _places(node: Node, path: KeyPath) -> Iterator[tuple[KeyPath, SourcePosition]]:
    """Keys and list items at every depth."""
    if isinstance(node, Mapping):
        for name, entry in node.entries.items():
            yield (*path, name), entry.place
            yield from _places(entry.node, (*path, name))
    elif isinstance(node, Items):
        for i, item in enumerate(node.nodes):
            yield (*path, i), item.place
            yield from _places(item, (*path, i))


def _unread(node: Node, path: KeyPath) -> Iterator[tuple[KeyPath, tuple[SourcePosition, ...]]]:
    """Mappings with keys that could not be read, and the places of their values."""
    if isinstance(node, Mapping):
        if node.unread:
            yield path, node.unread
        for name, entry in node.entries.items():
            yield from _unread(entry.node, (*path, name))
    elif isinstance(node, Items):
        for i, item in enumerate(node.nodes):
            yield from _unread(item, (*path, i))


def _secrets(node: Node, path: KeyPath) -> Iterator[tuple[KeyPath, Problem]]:
    if isinstance(node, Mapping):
        for name, entry in node.entries.items():
            yield from _secrets(entry.node, (*path, name))
    elif isinstance(node, Items):
        for i, item in enumerate(node.nodes):
            yield from _secrets(item, (*path, i))
    elif kind := find_secret(node.text):
        yield path, Problem(node.place, f"{dotted(path)}: {secret_message(kind)}")
