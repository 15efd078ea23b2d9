"""Changing a documented key changes the resolved recipe, and only at that key."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import pytest
from annotated_types import BaseMetadata
from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from qlora_cli.common.config import Config, field_docs
from qlora_cli.errors import RecipeError
from qlora_cli.recipe.field_types import FieldType, key_paths, type_names
from qlora_cli.recipe.load import LoadedRecipe
from qlora_cli.recipe.schema import Recipe

WHOLE = """\
model: {path: base, revision: main}
data:
  train: {path: rows.jsonl}
  evaluation: {path: held_out.jsonl}
training: {save_every: 5, spike: {}}
evaluation: {forgetting: {path: text.txt}}
output: {dir: run}
"""

NEEDED = {
    "model.trust_remote_code": (f"model.revision={40 * 'a'}",),
    "data.evaluation_share": ("data.evaluation=null",),
    "training.patience": ("training.eval_every=5",),
    "evaluation.best_by": (
        "evaluation.tasks=[{type: exact_match, name: other}]",
        "training.tasks_every=5",
    ),
    **dict.fromkeys(
        ("objective.labels", "objective.problem", "objective.class_weights"),
        ("evaluation.forgetting=null", "objective.labels=[name]", "objective.problem=multi"),
    ),
    "objective.center_rewards": ("evaluation.forgetting=null",),
}
"""Settings that a key requires."""

REFUSED = {"data.evaluation.weight", "evaluation.forgetting.weight"}
"""Keys of training sources that have no effect in these sections."""

Key = tuple[str, tuple[str, ...], FieldType]
"""Dotted key, overrides that choose the variants on the way to it, what it takes."""


def keys_of(part: type[Config], prefix: str = "", chosen: tuple[str, ...] = ()) -> Iterator[Key]:
    for name, info in part.model_fields.items():
        if name == "type":
            continue  # varied where the variant is chosen
        key, field_type = f"{prefix}{name}", FieldType.of(info)
        if field_type.variants:
            yield f"{key}.type", chosen, field_type
        for below in field_type.sections:
            choice = _choice(key, below) if field_type.variants else ()
            yield from keys_of(below, f"{key}.", (*chosen, *choice))
        if not field_type.sections:
            yield key, (*chosen, *NEEDED.get(key, ())), field_type


def _choice(key: str, variant: type[Config]) -> tuple[str, ...]:
    """A variant, with what it requires."""
    required = [
        f"{key}.{name}={next(candidates(FieldType.of(info)))}"
        for name, info in variant.model_fields.items()
        if info.is_required()
    ]
    return f"{key}.type={type_names(variant)[0]}", *required


def candidates(field_type: FieldType) -> Iterator[str]:
    yield from field_type.variants
    yield from field_type.choices
    for scalar in field_type.scalars:
        yield from {
            bool: ("true", "false"),
            int: ("1", "2", "3", "32", "1000"),
            float: ("0.125", "0.25", "3", "100"),
            str: ("other", ";", "3h55m"),
        }[scalar]
    if field_type.item:
        yield f"[{_item(field_type.item)}]"
    if field_type.value:
        yield f"{{name: {next(candidates(field_type.value))}}}"


def _item(field_type: FieldType) -> str:
    if field_type.variants or not field_type.sections:
        value = next(candidates(field_type))
        return f"{{type: {value}}}" if field_type.variants else value
    # What is required, and one key more.
    fields = list(field_type.sections[0].model_fields.items())
    number = 1 + sum(info.is_required() for _, info in fields)
    values = [f"{key}: {next(candidates(FieldType.of(info)))}" for key, info in fields[:number]]
    return f"{{{', '.join(values)}}}"


KEYS = list(keys_of(Recipe))


def test_keys_are_found_at_every_depth() -> None:
    found = {key for key, _, _ in KEYS}
    assert {"model.path", "adapter.r", "data.train.format.prompt_field"} <= found
    assert {"adapter.type", "optimizer.learning_rate", "evaluation.tasks"} <= found
    sections = {
        path for path in key_paths(Recipe) if any(key.startswith(f"{path}.") for key in found)
    }
    assert set(key_paths(Recipe)) - sections - set(without_settings(Recipe)) == found


def without_settings(part: type[Config], prefix: str = "") -> Iterator[str]:
    """Yield each section that has a single variant and no settings, and its `type`."""
    for name, info in part.model_fields.items():
        key, field_type = f"{prefix}{name}", FieldType.of(info)
        for below in field_type.sections:
            if not field_type.variants and set(below.model_fields) == {"type"}:
                yield from (key, f"{key}.type")
            yield from without_settings(below, f"{key}.")


@pytest.mark.parametrize(
    ("key", "chosen", "field_type"), KEYS, ids=["/".join([*chosen, key]) for key, chosen, _ in KEYS]
)
def test_each_key_changes_the_recipe(
    load: Callable[..., LoadedRecipe], key: str, chosen: tuple[str, ...], field_type: FieldType
) -> None:
    if key in REFUSED:
        assert load(WHOLE, f"{key}=1").recipe == load(WHOLE).recipe
        for value in candidates(field_type):
            with pytest.raises(RecipeError, match=rf"{key} .* would change nothing"):
                load(WHOLE, f"{key}={value}")
        return
    before = _leaves(load(WHOLE, *chosen).recipe.model_dump())
    for value in candidates(field_type):
        try:
            loaded = load(WHOLE, *chosen, f"{key}={value}")
        except RecipeError:
            continue  # out of bounds, or at odds with another key
        after = _leaves(loaded.recipe.model_dump())
        if after.get(key) == before.get(key):
            continue
        changed = {leaf for leaf in {*before, *after} if before.get(leaf) != after.get(leaf)}
        assert all(leaf == key or leaf.startswith(_section(key)) for leaf in changed)
        origins = [o for k, o in loaded.origins.items() if re.match(rf"{key}(?!\w)", k)]
        # A section in a list brings its own defaults.
        is_section = field_type.item is not None and field_type.item.sections
        assert set(origins) == ({"--set", "default"} if is_section else {"--set"})
        return
    pytest.fail(f"nothing changes {key}")


def _section(key: str) -> str:
    """Prefix of the keys that a key may change: another `type` brings other keys with it."""
    return key.removesuffix("type") if key.endswith(".type") else f"{key}."


def _leaves(value: object, prefix: str = "") -> dict[str, object]:
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    below = (_leaves(item, f"{prefix}.{key}".removeprefix(".")) for key, item in value.items())
    return {key: leaf for leaves in below for key, leaf in leaves.items()}


def parts_of(part: type[Config]) -> set[type[Config]]:
    found = {part}
    for info in part.model_fields.values():
        for below in FieldType.of(info).all_sections:
            found |= parts_of(below)
    return found


@pytest.mark.parametrize("part", sorted(parts_of(Recipe), key=lambda part: part.__name__))
def test_every_section_and_key_is_documented(part: type[Config]) -> None:
    assert part.__doc__, part
    for name, info in part.model_fields.items():
        assert name == "type" or field_docs(part).get(name), (
            f"{part.__name__}.{name} has no docstring"
        )
        assert FieldType.of(info).words(), f"the loader cannot read {part.__name__}.{name}"


@pytest.mark.parametrize("part", sorted(parts_of(Recipe), key=lambda part: part.__name__))
def test_every_default_is_an_allowed_value(part: type[Config]) -> None:
    """pydantic does not check defaults."""
    for name, info in part.model_fields.items():
        if info.is_required():
            assert name != "type", f'{part.__name__}.type: write Literal["name"] = "name"'
            continue
        default = info.get_default(call_default_factory=True)
        kind: TypeAdapter[Any] = TypeAdapter(Annotated[info.annotation, info])
        try:
            kind.validate_python(default, strict=True)
        except ValidationError as error:
            pytest.fail(f"{part.__name__}.{name} has a default that is not allowed: {error}")


@pytest.mark.parametrize("part", sorted(parts_of(Recipe), key=lambda part: part.__name__))
def test_every_bound_of_a_field_is_described(part: type[Config]) -> None:
    for name, info in part.model_fields.items():
        known = len(FieldType.of(info).bounds)
        constraints = [*info.metadata, *_inner_metadata(info.annotation)]
        bounds = [one for one in constraints if isinstance(one, BaseMetadata)]
        assert len(bounds) == known, f"{part.__name__}.{name}: {bounds}"


def _inner_metadata(annotation: object) -> list[object]:
    """The constraints of a union's members, such as those of `Annotated[int, Field(ge=1)]`."""
    members = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else ()
    return [
        constraint
        for member in members
        if get_origin(member) is Annotated
        for field in member.__metadata__
        if isinstance(field, FieldInfo)
        for constraint in field.metadata
    ]
