"""What is compared: a grid of recipes, methods and values of keys, as one recipe for each cell."""

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
from qlora_cli.common.hashing import hash_text
from qlora_cli.errors import RecipeError
from qlora_cli.recipe.field_types import FieldType, key_paths
from qlora_cli.recipe.load import load_recipe
from qlora_cli.recipe.schema import Recipe

_QLORA = ("quantization.type=nf4", "quantization.double_quant=true", "adapter.type=lora")
"""The method of the paper: the one name that is no `type` (Dettmers et al. 2023)."""

_RATE = "optimizer.learning_rate"

_NUMBER = r"\d+(?:\.\d+)?(?:[eE][-+]?\d+)?"
_RANGE = re.compile(rf"({_NUMBER})\.\.({_NUMBER})")


@dataclass(frozen=True)
class Axis:
    """A key and the values that it takes, for one method or for all that have the key."""

    key: str
    values: tuple[str, ...]
    method: str | None = None

    def __str__(self) -> str:
        return f"{self.method}:{self.key}" if self.method else self.key

    @property
    def range(self) -> tuple[float, float] | None:
        """Its ends, where it is written as one (`1e-5..1e-2`, `4..64`)."""
        found = _RANGE.fullmatch(self.values[0])
        return (float(found[1]), float(found[2])) if found and len(self.values) == 1 else None

    @property
    def is_whole(self) -> bool:
        """Whether the ends of its range are whole numbers."""
        return re.fullmatch(r"\d+\.\.\d+", self.values[0]) is not None

    def is_for(self, method: str | None, recipe: Recipe) -> bool:
        """Whether it says something of this method."""
        return self.method in (None, method) and has_key(recipe, self.key)


@dataclass(frozen=True)
class CompareRequest:
    """What the command line asks to compare.

    Attributes:
        methods: short names; none takes the recipes as they are.
        vary: `key=value,value`, or `method:key=value,value`.
        learning_rates: `method=number`.
        overrides: `key=value`, for every cell whose sections have the key.
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
    """One run of a comparison."""

    name: str
    recipe_name: str
    method: str | None
    settings: Mapping[str, str] = field(default_factory=dict)
    """Varied key -> its value here, as it was written."""
    recipe: Recipe | None = None
    """None where there can be none: `error` says why."""
    origins: Mapping[str, str] = field(default_factory=dict)
    error: str | None = None
    with_latency: bool = True
    """Whether its speed in generation is measured."""

    @property
    def slug(self) -> str:
        """Its name as that of a file."""
        text = re.sub(r"[^A-Za-z0-9.=_]+", "-", self.name).strip("-.")
        if len(text) <= 80 and text == self.name.replace(" ", "-"):
            return text
        # What was left out may be all that tells two cells apart.
        return f"{text[:80]}-{hash_text(self.name)[:6]}"


class Grid:
    """Makes cells of what was asked.

    Raises:
        RecipeError: it cannot be understood, whatever the recipes say.
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
                f"{sorted(map(str, unknown))[0]} is none of the methods that are compared "
                f"({', '.join(request.methods) or 'none'})",
                hint="name it in --methods too",
            )
        for method in request.methods:
            method_keys(method)
        keys = [axis.key for axis in self.axes]
        for key in [*keys, *(_key(text) for text in request.overrides)]:
            _refuse_unknown(key)
        self._labels = {key: _label(key, keys) for key in keys}

    @property
    def choices(self) -> list[tuple[Path, str | None]]:
        """Recipes by methods."""
        methods: list[str | None] = [*self._request.methods] or [None]
        return list(product(self._request.recipes, methods))

    @property
    def names(self) -> list[str]:
        """Of `choices`."""
        return [" ".join(filter(None, (path.stem, method))) for path, method in self.choices]

    def cells(self) -> list[Cell]:
        """All of them.

        Raises:
            RecipeError: recipes of different data, budgets or questions; a key that nobody has.
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
                    raise RecipeError(f"{option}: {key} is a key of no method compared here")
        _refuse_different_budgets(found, varied)
        return found

    def axes_of(self, recipe: Path, method: str | None) -> list[Axis]:
        """Those that say something of a method."""
        plain = self.cell(recipe, method, {})
        return [a for a in self.axes if plain.recipe and a.is_for(method, plain.recipe)]

    def _of(self, recipe: Path, method: str | None) -> Iterator[Cell]:
        axes = self.axes_of(recipe, method)
        for axis in axes:
            if axis.range:
                raise RecipeError(
                    f"--vary {axis}: {axis.values[0]} is a range, from which --search chooses",
                    hint="name the values, or give --search and --objective",
                )
        for values in product(*(axis.values for axis in axes)):
            pairs = zip((axis.key for axis in axes), values, strict=True)
            yield self.cell(recipe, method, dict(pairs))

    def cell(self, recipe: Path, method: str | None, settings: Mapping[str, str]) -> Cell:
        """One of them; a recipe that cannot be is a cell with an error."""
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
    """Whether a recipe has a key once the types among `chosen` are chosen.

    It is not read with some of them alone: only all together need to go with each other.
    """
    section, _, rest = key.partition(".")
    kind = chosen.get(f"{section}.type")
    if kind is None or rest == "type" or section not in Recipe.model_fields:
        return has_key(recipe, key)
    variant = FieldType.of(Recipe.model_fields[section]).variants.get(kind)
    return variant is None or rest.partition(".")[0] in variant.model_fields


def method_names() -> list[str]:
    """What `--methods` takes: every adapter and quantization there is, and qlora."""
    return [*_types("adapter"), "qlora", *(t for t in _types("quantization") if t != "none")]


def method_keys(name: str) -> list[str]:
    """The keys of a recipe that a method is.

    Raises:
        RecipeError: there is no such method.
    """
    if name == "qlora":
        return list(_QLORA)
    if name in _types("adapter"):
        return ["quantization.type=none", f"adapter.type={name}"]
    if name in _types("quantization"):
        return [f"quantization.type={name}", "adapter.type=lora"]
    raise RecipeError(f"--methods: {name} is none of {', '.join(method_names())}")


def _types(section: str) -> list[str]:
    return list(FieldType.of(Recipe.model_fields[section]).variants)


def has_key(recipe: Recipe, key: str) -> bool:
    """Whether the sections of a recipe, in the variants that it has, know a key."""
    part: object = recipe
    for name in key.strip().split("."):
        if not isinstance(part, Config):
            return True  # a list, or nothing so far: reading the recipe decides
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
        raise RecipeError(f"--vary {text}: a range goes from a smaller number to a larger")
    return axis


def _items(text: str) -> tuple[str, ...]:
    """The items of a list without its brackets; commas in quotes and brackets are part of them."""
    try:
        node = yaml.compose(f"[{text}]", Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise RecipeError(f"--vary: {text} is no list of values: {error}") from error
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
    if plain not in set(key_paths(Recipe)):
        raise RecipeError(
            f"{key} is no key of a recipe", hint="docs/reference/recipe.md has all keys"
        )


def _refuse_duplicates(option: str, names: Sequence[str]) -> None:
    """Raises RecipeError: of two that say the same, one would be lost."""
    if twice := [name for name, number in Counter(names).items() if number > 1]:
        raise RecipeError(
            f"{option}: {twice[0]} is given twice", hint="give it once, with all its values"
        )


def _refuse_same_stem(recipes: Sequence[Path]) -> None:
    """Raises RecipeError: cells are called after the files, and would be called the same."""
    paths: dict[str, Path] = {}
    for path in recipes:
        other = paths.setdefault(path.stem, path)
        if other != path:
            raise RecipeError(
                f"{other} and {path} would both be called {path.stem} in the table",
                hint="copy one to a file of another name",
            )


def _label(key: str, keys: Sequence[str]) -> str:
    """The last name of a key, where that is enough to tell it from the others."""
    last = key.rpartition(".")[2]
    return last if len({one for one in keys if one.rpartition(".")[2] == last}) == 1 else key


_EQUAL = ("data", "evaluation")
_EQUAL_IN_TRAINING = ("seed", "epochs", "max_steps", "batch_size")


def _refuse_different_budgets(cells: Sequence[Cell], varied: set[str]) -> None:
    """Other data, another seed or budget, or other questions would compare these, not methods."""
    known = [(cell, _shared(cell.recipe, varied)) for cell in cells if cell.recipe is not None]
    for cell, values in known[1:]:
        first, others = known[0]
        different = [key for key in values if values[key] != others[key]]
        if different:
            raise RecipeError(
                f"{first.name} and {cell.name} differ in {', '.join(different)}: what is compared "
                "has the same data, seed and budget",
                hint="give all of them one value (--set), or compare the values (--vary)",
            )


def _shared(recipe: Recipe, varied: set[str]) -> dict[str, object]:
    document = recipe.model_dump(mode="json")
    values = {key: document[key] for key in _EQUAL}
    values |= {f"training.{key}": document["training"][key] for key in _EQUAL_IN_TRAINING}
    is_varied = {key.partition(".")[0] for key in varied} & set(_EQUAL)
    return {k: v for k, v in values.items() if k not in varied and k not in is_varied}
