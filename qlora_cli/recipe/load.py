"""Load recipes: YAML, `extends` and command-line overrides. Dump them back to YAML."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from collections.abc import Mapping as ReadOnlyDict
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qlora_cli.common.secrets import masked
from qlora_cli.common.user_paths import expand_path
from qlora_cli.errors import RecipeError
from qlora_cli.recipe.other_tools import OTHER_NAMES
from qlora_cli.recipe.schema import Recipe
from qlora_cli.recipe.validation import validate_tree
from qlora_cli.recipe.yaml_parser import (
    Entry,
    Items,
    KeyPath,
    Mapping,
    Node,
    Problem,
    Scalar,
    SourcePosition,
    Tree,
    dotted,
    parse_tree,
    read_tree,
)
from qlora_cli.recipe.yaml_writer import Leaf, yaml_lines

MAX_EXTENDS = 10
"""Maximum length of a chain of `extends`."""

MAX_OVERRIDE = 200
"""Characters of an override that a message repeats."""

MAX_ALIGNED = 60
"""Comments are aligned up to this column."""

_JINJA = re.compile("{{|{%")


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe with the origin of each value."""

    recipe: Recipe
    origins: dict[str, str]
    """Dotted key -> "recipe.yaml:12", "base.yaml:3", "--set" or "default"."""


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Load a recipe with the recipes that it extends, and overrides such as `adapter.r=8`.

    Raises:
        RecipeError: with all problems, one line each, sorted by place.
    """
    layers = _Layers()
    return _load(layers, layers.overridden(layers.file(path, str(path)), overrides))


def recipe_of_model(path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Build a recipe with defaults for a model that is used without training.

    Raises:
        RecipeError: an override is wrong.
    """
    layers = _Layers()
    source = f"model {path}"
    layers.sources.append(source)
    # JSON is YAML. `data.train` and `output.dir` are required, but not used.
    data, output = {"train": {"path": "-"}}, {"dir": "-"}
    text = json.dumps({"model": {"path": path}, "data": data, "output": output})
    root = parse_tree(text, source, with_lines=False).root
    assert isinstance(root, Mapping)
    return _load(layers, layers.overridden(root, overrides)).recipe


def _load(layers: _Layers, tree: Mapping | None) -> LoadedRecipe:
    if tree is None:
        raise layers.error()
    result = validate_tree(Recipe, tree, other_names=OTHER_NAMES)
    layers.problems += result.problems
    if result.config is None or layers.problems:
        raise layers.error()
    return LoadedRecipe(result.config, _origins(result.config, result.places))


def dump_recipe(recipe: Recipe) -> str:
    """Format a recipe as YAML with all values; `load_recipe` loads an equal recipe from it."""
    return "".join(f"{line}\n" for line, _ in _lines(recipe))


def dump_with_origins(loaded: LoadedRecipe) -> str:
    """Format a recipe as YAML with all values, and the origin of each in a comment."""
    lines = list(_lines(loaded.recipe))
    # One very long line (such as a regular expression) must not push all comments out of sight.
    width = min(MAX_ALIGNED, max(len(line) for line, _ in lines))
    return "".join(
        f"{line:<{width}}  # {loaded.origins[dotted(key)]}\n" if key else f"{line}\n"
        for line, key in lines
    )


def _lines(recipe: Recipe) -> Iterator[Leaf]:
    return yaml_lines(_type_first(recipe.model_dump(mode="json")))


def _type_first(value: Any) -> Any:
    """Put `type` first in each section: it determines the other keys."""
    if isinstance(value, list):
        return [_type_first(item) for item in value]
    if not isinstance(value, dict):
        return value
    first = {"type": value["type"]} if "type" in value else {}
    return {key: _type_first(below) for key, below in {**first, **value}.items()}


def _origins(recipe: Recipe, places: ReadOnlyDict[KeyPath, SourcePosition]) -> dict[str, str]:
    sources = {place.source for place in places.values() if place.line}
    names = [Path(source).name for source in sources]
    short = {s: Path(s).name if names.count(Path(s).name) == 1 else s for s in sources}

    def origin(path: KeyPath) -> str:
        place = places.get(path)
        if place is None:
            return "default"
        return f"{short[place.source]}:{place.line}" if place.line else "--set"

    return {dotted(path): origin(path) for _, path in _lines(recipe) if path}


@dataclass
class _Layers:
    """Merges base recipes, a recipe and overrides; collects the problems of all of them."""

    problems: list[Problem] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)

    def error(self) -> RecipeError:
        order = {source: i for i, source in enumerate(self.sources)}
        lines = sorted(
            dict.fromkeys(self.problems),
            key=lambda p: (order[p.place.source], p.place.line, p.place.column),
        )
        # Messages repeat wrong values, and others may see the log.
        text = masked("\n".join(map(str, lines)))
        return RecipeError(text if len(lines) == 1 else f"{len(lines)} problems\n{text}")

    def file(self, path: Path, source: str) -> Mapping | None:
        """Parse a file and merge it with all that it extends; None if that fails."""
        self.sources.append(source)
        tree = read_tree(path, source)
        self.problems += tree.problems
        root = self._root(tree, SourcePosition(source, 1, 1))
        extends = root.entries.get("extends") if root else None
        if root is None or extends is None:
            return root
        self.files.append(os.path.realpath(path))
        own = replace(root, entries={k: v for k, v in root.entries.items() if k != "extends"})
        base_path = self._base_path(extends.node, path)
        base = self.file(base_path, _name_beside(source, extends.node)) if base_path else None
        # Without its base, a recipe lacks keys: do not report them as missing.
        return _merged(base, own) if base else None

    def overridden(self, tree: Mapping | None, overrides: Sequence[str]) -> Mapping | None:
        """Merge all overrides into the tree; later ones win."""
        layer: Mapping | None = None
        for override in overrides:
            one = self._override(override)
            layer = _merged(layer, one) if layer and one else one or layer
        return _merged(tree, layer) if tree and layer else tree

    def _override(self, text: str) -> Mapping | None:
        source = f"--set {text if len(text) <= MAX_OVERRIDE else text[:MAX_OVERRIDE] + '...'}"
        self.sources.append(source)
        place = SourcePosition(source)
        key, equals, value = text.partition("=")
        names = key.strip().split(".")
        if not equals or not all(names):
            self._report(place, "must have the form section.key=value")
            return None
        if names[0] == "extends":
            self._report(place, "extends is only allowed at the top of a file")
            return None
        tree = parse_tree(value, source, with_lines=False)
        if tree.problems and _JINJA.search(value):
            quoted = shlex.quote(f"{key.strip()}={json.dumps(value.strip(), ensure_ascii=False)}")
            self._report(place, f"text with {{{{ or {{% needs quotes: --set {quoted}")
            return None
        self.problems += tree.problems
        node = tree.root
        for name in reversed(names):
            node = node and Mapping({name: Entry(place, node)}, place)
        return node if isinstance(node, Mapping) else None

    def _root(self, tree: Tree, place: SourcePosition) -> Mapping | None:
        root = tree.root
        if root is None or isinstance(root, Mapping):
            return root
        found = "a list" if isinstance(root, Items) else "text"
        if isinstance(root, Scalar) and root.is_null:
            found = "nothing: the file is empty"
        keys = ", ".join(Recipe.model_fields)
        self._report(place, f"found {found}; a recipe has the sections {keys}")
        return None

    def _base_path(self, node: Node, path: Path) -> Path | None:
        if not isinstance(node, Scalar) or node.is_null or not node.text:
            self._report(node.place, "extends: it takes the path of one YAML file")
            return None
        try:
            base = path.parent / expand_path(node.text)
        except ValueError as error:
            self._report(node.place, f"extends: {error}")
            return None
        if not os.path.isfile(base):  # unlike Path.is_file, it accepts invalid names
            self._report(node.place, f"extends: there is no file {base}")
            return None
        if os.path.realpath(base) in self.files:
            self._report(node.place, f"extends: {node.text} closes a cycle of recipes")
            return None
        if len(self.files) > MAX_EXTENDS:
            self._report(node.place, f"extends: a chain of more than {MAX_EXTENDS} recipes")
            return None
        return base

    def _report(self, place: SourcePosition, message: str) -> None:
        self.problems.append(Problem(place, message))


def _name_beside(source: str, node: Node) -> str:
    assert isinstance(node, Scalar)
    return os.path.normpath(Path(source).parent / expand_path(node.text))


def _merged(base: Mapping, over: Mapping) -> Mapping:
    """Merge `over` into `base`: mappings key by key; anything else is replaced.

    A section of another `type` replaces the base's section, whose keys belong to that type.
    """
    types = {_type_of(base), _type_of(over)} - {None}
    if len(types) > 1:
        return over
    entries = dict(base.entries)
    for key, entry in over.entries.items():
        below = entries[key].node if key in entries else None
        if isinstance(entry.node, Mapping) and isinstance(below, Mapping):
            entries[key] = Entry(entries[key].place, _merged(below, entry.node))
        else:
            entries[key] = entry
    return Mapping(entries, base.place, base.unread + over.unread)


def _type_of(section: Mapping) -> str | None:
    entry = section.entries.get("type")
    return entry.node.text if entry and isinstance(entry.node, Scalar) else None
