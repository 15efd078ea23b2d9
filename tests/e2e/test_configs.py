"""Every recipe to copy is trained for three steps, its model and data replaced by tiny ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest

from qlora_cli.adapters import AdapterConfig
from qlora_cli.objectives import ObjectiveConfig
from qlora_cli.recipe.load import load_recipe
from qlora_cli.train.train import train
from qlora_cli.types import RowKind
from tests.conftest import mostly_slow, save_tiny_model

OBJECTIVES = get_args(get_args(ObjectiveConfig)[0])
METHODS = get_args(get_args(AdapterConfig)[0])

CONFIGS = sorted((Path(__file__).parents[2] / "configs").rglob("*.yaml"))


def test_there_is_a_recipe_of_each_kind() -> None:
    recipes = [load_recipe(path).recipe for path in CONFIGS]
    kinds = {(recipe.adapter.type, recipe.quantization.type) for recipe in recipes}
    assert kinds >= {("lora", "nf4"), ("lora", "int8"), ("lora", "none"), ("full", "none")}
    methods = {get_args(kind.model_fields["type"].annotation)[0] for kind in METHODS}
    assert methods == {method for method, _ in kinds}


def rows_of_kind(
    kind: RowKind, conversations: list[dict[str, Any]]
) -> tuple[str, list[dict[str, Any]]]:
    """Return a format, and rows for it."""
    turns = [row["messages"] for row in conversations]
    if kind == "pairs":
        return "preference", [
            {"prompt": user["content"], "chosen": answer["content"], "rejected": "no"}
            for user, answer in turns
        ]
    if kind == "feedback":
        return "feedback", [
            {"prompt": user["content"], "completion": answer["content"], "label": at % 2 == 0}
            for at, (user, answer) in enumerate(turns)
        ]
    if kind == "labels":
        return "labelled", [
            {"text": answer["content"], "label": at % 2} for at, (_, answer) in enumerate(turns)
        ]
    # JSON, since the quickstart scores its answers as such.
    return "messages", [
        {"messages": [user, {**answer, "content": json.dumps(answer["content"])}]}
        for user, answer in turns
    ]


def test_there_is_a_recipe_for_each_objective() -> None:
    shipped = {load_recipe(path).recipe.objective.type for path in CONFIGS}
    assert shipped == {get_args(kind.model_fields["type"].annotation)[0] for kind in OBJECTIVES}


@pytest.mark.parametrize("path", mostly_slow(CONFIGS, *CONFIGS[::10]), ids=lambda path: path.stem)
def test_every_config_trains_for_three_steps(
    path: Path, tiny_model: Path, tiny_rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    rows, shipped = tmp_path / "rows.jsonl", load_recipe(path).recipe
    format_type, made = rows_of_kind(shipped.objective.rows, tiny_rows)
    rows.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    model = tiny_model
    if shipped.adapter.type == "bitfit":  # the usual one has no biases
        model = save_tiny_model(tmp_path / "model", attention_bias=True, mlp_bias=True)
    source = f"{{path: {json.dumps(str(rows))}, format: {{type: {format_type}}}}}"
    # The adapter to start from is that of another run.
    warm = ["adapter.init_from=null"] if "init_from" in shipped.adapter.model_fields_set else []
    recipe = load_recipe(
        path,
        [
            f"model.path={model}",
            f"data={{train: {source}, evaluation: {source}, max_length: 96}}",
            *warm,
            "training.epochs=null",
            "training.max_steps=3",
            f"output.dir={tmp_path / 'run'}",
        ],
    ).recipe
    record = train(recipe)
    assert record["status"] == "finished"
    assert record["best"]["step"] == 3
    assert (tmp_path / "run" / "last").is_dir()
