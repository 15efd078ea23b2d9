from __future__ import annotations

import copy
import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml
from jsonschema import Draft202012Validator

from qlora_cli.common.config import Config
from qlora_cli.recipe.field_types import FieldType
from qlora_cli.recipe.json_schema import recipe_schema
from qlora_cli.recipe.load import LoadedRecipe, load_recipe
from qlora_cli.recipe.schema import Recipe

SCHEMA = recipe_schema()
VALIDATOR = Draft202012Validator(SCHEMA)

WHOLE: dict[str, Any] = {
    "model": {"path": "base", "revision": "main"},
    "quantization": {"type": "nf4", "double_quant": False},
    "adapter": {"type": "lora", "r": 8, "target_modules": ["q_proj"], "rank_pattern": {"q": 4}},
    "data": {
        "train": {"path": "rows.jsonl", "format": {"type": "text", "field": "body"}},
        "evaluation": {"path": "held_out.jsonl", "limit": 10},
        "max_length": 512,
    },
    "training": {"epochs": 1.5, "max_steps": None, "precision": "bf16"},
    "optimizer": {"type": "adamw_8bit", "learning_rate": 2e-4},
    "schedule": {"type": "cosine", "warmup_steps": 10},
    "evaluation": {"tasks": [{"type": "json_match"}]},
    "output": {"dir": "run", "trackers": ["tensorboard"]},
}


def sections() -> Iterator[tuple[str, dict[str, Any]]]:
    yield "Recipe", SCHEMA
    yield from SCHEMA["$defs"].items()


def test_it_is_a_schema() -> None:
    Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert json.loads(json.dumps(SCHEMA)) == SCHEMA


@pytest.mark.parametrize(("name", "section"), list(sections()))
def test_every_key_is_described_and_no_other_is_let_in(name: str, section: dict[str, Any]) -> None:
    assert section["description"]
    assert section["additionalProperties"] is False
    for key, schema in section["properties"].items():
        assert schema["description"], f"{name}.{key}"


def keys(part: type[Config]) -> Iterator[str]:
    for name, info in part.model_fields.items():
        yield name
        for below in FieldType.of(info).all_sections:
            yield from keys(below)


def test_every_key_of_the_recipe_is_there() -> None:
    known = {key for _, section in sections() for key in section["properties"]}
    assert {*keys(Recipe), "extends"} == known


def test_bounds_choices_and_defaults_are_there() -> None:
    properties = SCHEMA["$defs"]["LoRA"]["properties"]
    assert properties["r"]["minimum"] == 1
    assert properties["dropout"]["exclusiveMaximum"] == 1
    assert properties["type"]["const"] == "lora"
    precision = SCHEMA["$defs"]["Training"]["properties"]["precision"]
    assert precision["enum"] == ["auto", "bf16", "fp16", "fp32"]
    assert precision["default"] == "auto"


def test_a_good_recipe_is_accepted_by_schema_and_loader(load: Callable[..., LoadedRecipe]) -> None:
    VALIDATOR.validate(WHOLE)
    loaded = load(json.dumps(WHOLE))
    VALIDATOR.validate(loaded.recipe.model_dump(mode="json"))


def test_a_recipe_on_another_may_leave_out_anything() -> None:
    VALIDATOR.validate({"extends": "base.yaml"})
    VALIDATOR.validate({"extends": "base.yaml", "adapter": {"r": 8}, "data": {"max_length": 99}})
    assert not VALIDATOR.is_valid({"extends": "base.yaml", "adapter": {"rank": 8}})
    assert not VALIDATOR.is_valid({"extends": ["base.yaml"]})
    assert not VALIDATOR.is_valid({**WHOLE, "training": {"extends": "base.yaml"}})


@pytest.mark.parametrize(
    "path",
    [
        ("model",), ("data",), ("output",), ("model", "path"), ("data", "train"),
        ("data", "train", "path"), ("data", "train", "format", "type"),
        ("data", "evaluation", "path"), ("output", "dir"), ("adapter", "type"),
        ("quantization", "type"), ("optimizer", "type"), ("schedule", "type"),
        ("evaluation", "tasks", 0, "type"),
    ],
    ids=str,
)  # fmt: skip
def test_the_schema_requires_what_the_loader_requires(
    problems: Callable[..., list[str]], path: tuple[str | int, ...]
) -> None:
    recipe = copy.deepcopy(WHOLE)
    below: Any = recipe
    for key in path[:-1]:
        below = below[key]
    del below[path[-1]]
    assert not VALIDATOR.is_valid(recipe)
    assert "is missing" in problems(json.dumps(recipe))[0]


def damaged(rng: random.Random) -> dict[str, Any]:
    """WHOLE with one value of a wrong type, out of bounds or under a wrong name."""
    recipe = copy.deepcopy(WHOLE)
    section = rng.choice([below for below in _mappings(recipe) if "q" not in below])
    key = rng.choice(list(section))
    if rng.random() < 0.3:
        section[f"{key}x"] = section.pop(key)
    elif isinstance(section[key], bool):
        section[key] = rng.choice(["maybe", 2, [True], None])
    elif isinstance(section[key], int | float):
        section[key] = rng.choice(["many", -1, [1], {"a": 1}])
    elif isinstance(section[key], dict):
        section[key] = rng.choice([5, [1], "text", True])
    else:
        section[key] = rng.choice([[[1]], {"a": 1}])
    return recipe


def _mappings(value: Any) -> Iterator[dict[str, Any]]:
    for below in value.values() if isinstance(value, dict) else value:
        if isinstance(below, dict | list):
            yield from _mappings(below)
    if isinstance(value, dict):
        yield value


@pytest.mark.parametrize("seed", range(100))
def test_the_schema_rejects_what_the_loader_rejects(
    problems: Callable[..., list[str]], seed: int
) -> None:
    recipe = damaged(random.Random(seed))
    assert not VALIDATOR.is_valid(recipe), recipe
    assert problems(json.dumps(recipe))


def test_it_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    from qlora_cli.cli import main

    with pytest.raises(SystemExit) as exit_:
        main(["schema"])
    assert exit_.value.code == 0
    assert json.loads(capsys.readouterr().out) == SCHEMA


class EditorLoader(yaml.SafeLoader):
    """YAML 1.2, as editors read it: 2e-4 is a number, and `no` is text."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}


for tag, pattern in {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?[0-9]+",
    "float": r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?",
}.items():
    EditorLoader.add_implicit_resolver(
        f"tag:yaml.org,2002:{tag}", re.compile(f"^(?:{pattern})$"), None
    )

CONFIGS = sorted((Path(__file__).parents[3] / "configs").rglob("*.yaml"))


def test_there_are_recipes_to_copy() -> None:
    assert CONFIGS


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_recipes_to_copy_are_accepted(path: Path) -> None:
    VALIDATOR.validate(yaml.load(path.read_text(encoding="utf-8"), EditorLoader))
    VALIDATOR.validate(load_recipe(path).recipe.model_dump(mode="json"))
