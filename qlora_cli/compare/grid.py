"""The grid of a comparison: recipes x methods x values of keys, one recipe per cell."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path

import yaml

from qlora_cli.common.config import Config
from qlora_cli.common.formatting import did_you_mean
from qlora_cli.common.hashing import hash_text
from qlora_cli.errors import RecipeError
from qlora_cli.recipe.field_types import FieldType, key_paths
from qlora_cli.recipe.load import load_recipe
from qlora_cli.recipe.other_tools import OTHER_NAMES
from qlora_cli.recipe.schema import Recipe

_QLORA = ("quantization.type=nf4", "quantization.double_quant=true", "adapter.type=lora")
"""The method of the QLoRA paper (Dettmers et al. 2023); every other name is a `type`."""

_RATE = "optimizer.learning_rate"

_NUMBER = r"\d+(?:\.\d+)?(?:[eE][-+]?\d+)?"
_RANGE = re.compile(rf"({_NUMBER})\.\.({_NUMBER})")


@dataclass(frozen=True)
class Axis:
    """A varied key and its values, for one method or for all methods with that key."""

    key: str
    values: tuple[str, ...]
    method: str | None = None

    def __str__(self) -> str:
        return f"{self.method}:{self.key}" if self.method else self.key

    @property
    def range(self) -> tuple[float, float] | None:
        """Ends of the range, if the values are written as one (`1e-5..1e-2`, `4..64`)."""
        found = _RANGE.fullmatch(self.values[0])
        return (float(found[1]), float(found[2])) if found and len(self.values) == 1 else None

    @property
    def is_whole(self) -> bool:
        """True if both ends of the range are whole numbers."""
        return re.fullmatch(r"\d+\.\.\d+", self.values[0]) is not None

    def is_for(self, method: str | None, recipe: Recipe) -> bool:
        """Tell whether the axis applies to a method."""
        return self.method in (None, method) and has_key(recipe, self.key)


@dataclass(frozen=True)
class CompareRequest:
    """The comparison that the command line describes.

    Attributes:
        methods: short names; empty compares the recipes as they are.
        vary: `key=value,value`, or `method:key=value,value`.
        learning_rates: `method=number`.
        overrides: `key=value`, for every cell whose recipe has the key.
        speaks: measure how quickly each answers, which takes a merge.
    """

    recipes: Sequence[Path]
    methods: Sequence[str] = ()
    vary: Sequence[str] = ()
    learning_rates: Sequence[str] = ()
    overrides: Sequence[str] = ()
    with_latency: bool = True


@dataclass(frozen=True)
class Cell:
    """One cell of the grid: one run."""

    name: str
    recipe_name: str
    method: str | None
    settings: Mapping[str, str] = field(default_factory=dict)
    """Varied key -> its value in this cell, as written on the command line."""
    recipe: Recipe | None = None
    """None if the settings are invalid; `error` says why."""
    origins: Mapping[str, str] = field(default_factory=dict)
    error: str | None = None
    with_latency: bool = True
    """Measure its generation speed."""

    @property
    def slug(self) -> str:
        """The name in a form that is safe for files."""
        text = re.sub(r"[^A-Za-z0-9.=_]+", "-", self.name).strip("-.")
        if len(text) <= 80 and text == self.name.replace(" ", "-"):
            return text
        # The removed characters may be the only difference between two cells.
        return f"{text[:80]}-{hash_text(self.name)[:6]}"


class Grid:
    """Turn a request into cells.

    Raises:
        RecipeError: the request is invalid, regardless of the recipes.
    """

    def __init__(self, request: CompareRequest, folder: Path) -> None:
        self._request = request
        self._folder = folder
        self.axes = [_axis(text) for text in request.vary]
        rates = [_rate(text) for text in request.learning_rates]
        self._rates = dict(rates)
        _refuse_duplicates("--learning-rate", [method for method, _ in rates])
        for method in request.methods or ("",):
            keys = [axis.key for axis in self.axes if axis.method in (None, method)]
            _refuse_duplicates("--vary", keys)
        _refuse_same_stem(request.recipes)
        named = {axis.method for axis in self.axes} | self._rates.keys()
        if unknown := named - {None, *request.methods}:
            raise RecipeError(
                f"{sorted(map(str, unknown))[0]} is not one of the compared methods "
                f"({', '.join(request.methods) or 'none'})",
                hint="add it to --methods",
            )
        for method in request.methods:
            method_keys(method)
        keys = [axis.key for axis in self.axes]
        for key in [*keys, *(_key(text) for text in request.overrides)]:
            _refuse_unknown(key)
        self._labels = {key: _label(key, keys) for key in keys}

    @property
    def choices(self) -> list[tuple[Path, str | None]]:
        """Every combination of a recipe and a method."""
        methods: list[str | None] = [*self._request.methods] or [None]
        return list(product(self._request.recipes, methods))

    @property
    def names(self) -> list[str]:
        """Names of `choices`, in the same order."""
        return [" ".join(filter(None, (path.stem, method))) for path, method in self.choices]

    def cells(self) -> list[Cell]:
        """Return all cells of the grid.

        Raises:
            RecipeError: recipes differ in data, budget or evaluation, or no recipe has a key.
        """
        found = [cell for recipe, method in self.choices for cell in self._of(recipe, method)]
        found = list({cell.name: cell for cell in found}.values())
        varied = {key for cell in found for key in cell.settings}
        recipes = [cell.recipe for cell in found if cell.recipe is not None]
        if len(recipes) == len(found):
            request = [("--vary", axis.key) for axis in self.axes]
            request += [("--set", _key(text)) for text in self._request.overrides]
            for option, key in request:
                if not any(has_key(recipe, key) for recipe in recipes):
                    raise RecipeError(f"{option}: none of the compared methods has the key {key}")
        _refuse_different_budgets(found, varied)
        return found

    def axes_of(self, recipe: Path, method: str | None) -> list[Axis]:
        """Return the axes that apply to a method."""
        plain = self.cell(recipe, method, {})
        return [a for a in self.axes if plain.recipe and a.is_for(method, plain.recipe)]

    def _of(self, recipe: Path, method: str | None) -> Iterator[Cell]:
        axes = self.axes_of(recipe, method)
        for axis in axes:
            if axis.range:
                raise RecipeError(
                    f"--vary {axis}: the range {axis.values[0]} works only with --search",
                    hint="list the values, or add --search and --objective",
                )
        for values in product(*(axis.values for axis in axes)):
            pairs = zip((axis.key for axis in axes), values, strict=True)
            yield self.cell(recipe, method, dict(pairs))

    def cell(self, recipe: Path, method: str | None, settings: Mapping[str, str]) -> Cell:
        """Return one cell. If its recipe is invalid, the cell has an error instead."""
        stems = [recipe.stem] if len(self._request.recipes) > 1 else []
        values = [f"{self._labels[key]}={value}" for key, value in settings.items()]
        name = " ".join([*stems, *([method] if method else []), *values]) or recipe.stem
        cell = Cell(name, recipe.stem, method, settings, with_latency=self._request.with_latency)
        overrides = [] if method is None else method_keys(method)
        try:
            base = load_recipe(recipe, overrides).recipe
            chosen = dict(map(_setting, self._request.overrides))
            overrides += [
                o for o in self._request.overrides if _has_key_with_types(base, chosen, _key(o))
            ]
            if method in self._rates:
                overrides.append(f"{_RATE}={self._rates[method]}")
            overrides += [f"{key}={value}" for key, value in settings.items()]
            place = json.dumps(str(self._folder / "runs" / cell.slug))
            loaded = load_recipe(recipe, [*overrides, f"output.dir={place}"])
        except RecipeError as error:
            return replace(cell, error=str(error))
        return replace(cell, recipe=loaded.recipe, origins=loaded.origins)


def _setting(override: str) -> tuple[str, str]:
    key, _, value = override.partition("=")
    return key.strip(), value.strip()


def _key(override: str) -> str:
    return _setting(override)[0]


def _has_key_with_types(recipe: Recipe, chosen: Mapping[str, str], key: str) -> bool:
    """Tell whether a recipe has a key after the types among `chosen` are set.

    Only all settings together need to be valid, so the recipe is not loaded with some of them.
    """
    section, _, rest = key.partition(".")
    kind = chosen.get(f"{section}.type")
    if kind is None or rest == "type" or section not in Recipe.model_fields:
        return has_key(recipe, key)
    variant = FieldType.of(Recipe.model_fields[section]).variants.get(kind)
    return variant is None or rest.partition(".")[0] in variant.model_fields


def method_names() -> list[str]:
    """Return the names that `--methods` accepts: every adapter and quantization type, and qlora."""
    return [*_types("adapter"), "qlora", *(t for t in _types("quantization") if t != "none")]


def method_keys(name: str) -> list[str]:
    """Return the recipe settings that a method stands for.

    Raises:
        RecipeError: the method is unknown.
    """
    if name == "qlora":
        return list(_QLORA)
    if name in _types("adapter"):
        return ["quantization.type=none", f"adapter.type={name}"]
    if name in _types("quantization"):
        return [f"quantization.type={name}", "adapter.type=lora"]
    names = method_names()
    raise RecipeError(
        f"--methods: unknown method {name}{did_you_mean(name, names)}; choose from "
        f"{', '.join(names)}"
    )


def _types(section: str) -> list[str]:
    return list(FieldType.of(Recipe.model_fields[section]).variants)


def has_key(recipe: Recipe, key: str) -> bool:
    """Tell whether the sections of a recipe, with their current types, have a key."""
    part: object = recipe
    for name in key.strip().split("."):
        if not isinstance(part, Config):
            return True  # a list, or null: loading the recipe decides
        if name not in type(part).model_fields:
            return False
        part = getattr(part, name)
    return True


def _axis(text: str) -> Axis:
    key, equals, values = text.partition("=")
    method, colon, name = key.rpartition(":")
    found = _items(values)
    if not equals or not found:
        raise RecipeError(
            f"--vary {text}: needs the form section.key=value,value",
            hint="--vary adapter.r=4,16 --vary 'lora:adapter.target_modules=[q_proj,v_proj],"
            "all-linear'",
        )
    axis = Axis(name.strip(), found, method.strip() if colon else None)
    if axis.range and axis.range[0] >= axis.range[1]:
        raise RecipeError(f"--vary {text}: a range must go from a smaller number to a larger one")
    return axis


def _items(text: str) -> tuple[str, ...]:
    """Split a list without its brackets. Commas in quotes or brackets do not separate items."""
    try:
        node = yaml.compose(f"[{text}]", Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise RecipeError(f"--vary: {text} is not a list of values: {error}") from error
    if not isinstance(node, yaml.SequenceNode):
        return ()
    marks = [(item.start_mark.index - 1, item.end_mark.index - 1) for item in node.value]
    return tuple(text[start:end].strip() for start, end in marks)


def _rate(text: str) -> tuple[str, str]:
    method, equals, rate = text.partition("=")
    if not equals or not rate:
        raise RecipeError(f"--learning-rate {text}: needs the form METHOD=NUMBER")
    return method.strip(), rate.strip()


def _refuse_unknown(key: str) -> None:
    plain = re.sub(r"\[\d+\]|\.\d+(?=\.)", "", key)
    keys = list(dict.fromkeys(key_paths(Recipe)))
    if plain not in keys:
        section, _, name = plain.rpartition(".")
        ours = OTHER_NAMES.get(name, name)
        here = [one for one in keys if one in (ours, f"{section}.{ours}")]
        question = f" (did you mean {here[0]}?)" if here else did_you_mean(plain, keys)
        raise RecipeError(
            f"{key} is not a recipe key{question}", hint="docs/reference/recipe.md lists all keys"
        )


def _refuse_duplicates(option: str, names: Sequence[str]) -> None:
    """Raise RecipeError if a name occurs twice, because one of the two would be ignored."""
    if twice := [name for name, number in Counter(names).items() if number > 1]:
        raise RecipeError(
            f"{option}: {twice[0]} is given twice", hint="give it once, with all its values"
        )


def _refuse_same_stem(recipes: Sequence[Path]) -> None:
    """Raise RecipeError if two recipes would give their cells the same name."""
    paths: dict[str, Path] = {}
    for path in recipes:
        other = paths.setdefault(path.stem, path)
        if other != path:
            raise RecipeError(
                f"{other} and {path} would both be named {path.stem} in the table",
                hint="copy one to a file with another name",
            )


def _label(key: str, keys: Sequence[str]) -> str:
    """Shorten a key to its last part, if that is unique among the keys."""
    last = key.rpartition(".")[2]
    return last if len({one for one in keys if one.rpartition(".")[2] == last}) == 1 else key


_EQUAL = ("data", "evaluation")
_EQUAL_IN_TRAINING = ("seed", "epochs", "max_steps", "batch_size")


def _refuse_different_budgets(cells: Sequence[Cell], varied: set[str]) -> None:
    """Raise RecipeError if cells differ in data, seed, budget or evaluation."""
    known = [(cell, _shared(cell.recipe, varied)) for cell in cells if cell.recipe is not None]
    for cell, values in known[1:]:
        first, others = known[0]
        different = [key for key in values if values[key] != others[key]]
        if different:
            raise RecipeError(
                f"{first.name} and {cell.name} differ in {', '.join(different)}; a "
                "comparison needs the same data, seed and budget for all",
                hint="give them the same value with --set, or compare the values with --vary",
            )


def _shared(recipe: Recipe, varied: set[str]) -> dict[str, object]:
    document = recipe.model_dump(mode="json")
    values = {key: document[key] for key in _EQUAL}
    values |= {f"training.{key}": document["training"][key] for key in _EQUAL_IN_TRAINING}
    is_varied = {key.partition(".")[0] for key in varied} & set(_EQUAL)
    return {k: v for k, v in values.items() if k not in varied and k not in is_varied}
