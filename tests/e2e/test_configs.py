"""Every recipe to copy is trained for three steps, its model and data replaced by tiny ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest

from qlora_cli.adapters import AdapterConfig
from qlora_cli.recipe.load import load_recipe
from qlora_cli.train.train import train
from tests.conftest import mostly_slow, save_tiny_model

METHODS = get_args(get_args(AdapterConfig)[0])

CONFIGS = sorted((Path(__file__).parents[2] / "configs").rglob("*.yaml"))


def test_there_is_a_recipe_of_each_kind() -> None:
    recipes = [load_recipe(path).recipe for path in CONFIGS]
    kinds = {(recipe.adapter.type, recipe.quantization.type) for recipe in recipes}
    assert kinds >= {("lora", "nf4"), ("lora", "int8"), ("lora", "none"), ("full", "none")}
    methods = {get_args(kind.model_fields["type"].annotation)[0] for kind in METHODS}
    assert methods == {method for method, _ in kinds}


@pytest.mark.parametrize("path", mostly_slow(CONFIGS, *CONFIGS[::10]), ids=lambda path: path.stem)
def test_every_config_trains_for_three_steps(
    path: Path, tiny_model: Path, tiny_rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    for row in tiny_rows:
        user, answer = row["messages"]
        # JSON, since the quickstart scores its answers as such.
        messages = [user, {**answer, "content": json.dumps(answer["content"])}]
        with rows.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"messages": messages}) + "\n")
    model = tiny_model
    if load_recipe(path).recipe.adapter.type == "bitfit":  # the usual one has no biases
        model = save_tiny_model(tmp_path / "model", attention_bias=True, mlp_bias=True)
    source = f"{{path: {json.dumps(str(rows))}, format: {{type: messages}}}}"
    recipe = load_recipe(
        path,
        [
            f"model.path={model}",
            f"data={{train: {source}, evaluation: {source}, max_length: 96}}",
            "training.epochs=null",
            "training.max_steps=3",
            f"output.dir={tmp_path / 'run'}",
        ],
    ).recipe
    record = train(recipe)
    assert record["status"] == "finished"
    assert record["best"]["step"] == 3
    assert (tmp_path / "run" / "last").is_dir()
