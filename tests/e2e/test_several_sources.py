"""Recipes with several sources, through the command line."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from qlora_cli.cli import main
from qlora_cli.recipe.load import load_recipe


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return int(caught.value.code or 0)


@pytest.fixture
def recipe(tiny_recipe: Callable[..., Any], tmp_path: Path) -> Path:
    """Conversations and a packed table, one bad row in each, and a share of both held out."""
    document = tiny_recipe().model_dump(mode="json", exclude_unset=True)
    [rows] = tmp_path.glob("rows.jsonl")
    with rows.open("a", encoding="utf-8") as file:
        file.write('{"messages": [{"role": "humain", "content": "say ab 9"}]}\n')
    table = [f"say xy {i}\t{i % 2}\n" for i in range(40)]
    with gzip.open(tmp_path / "table.tsv.gz", "wt", encoding="utf-8") as file:
        file.writelines([*table, "say xy 41\t7\n"])
    template = {
        "type": "template",
        "user": "{{ text }}",
        "assistant": "{{ ['no', 'yes'][label | int] }}",
    }
    document["data"] = {
        "train": [
            {"path": str(tmp_path / "r*.jsonl")},
            {
                "path": str(tmp_path / "table.tsv.gz"),
                "columns": ["text", "label"],
                "format": template,
                "shuffle": True,
            },
        ],
        "evaluation_share": 0.25,
        "on_bad_row": "skip",
        "max_length": 96,
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
    return path


def test_sources_are_mixed_and_evaluated_on_the_held_out_rows(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("train", recipe, "--json") == 0
    record = json.loads(capsys.readouterr().out)
    training, held_out = record["data"]["training"], record["data"]["evaluation"]
    assert training["num_rows"] + held_out["num_rows"] == 16 + 40
    assert 4 < held_out["num_rows"] < 28
    assert training["num_bad"] + held_out["num_bad"] == 2

    again = tmp_path / "again"
    saved = tmp_path / "run" / "recipe.yaml"
    assert load_recipe(saved).recipe == load_recipe(recipe).recipe
    assert run("train", saved, "--set", f"output.dir={again}") == 0
    name = "last/adapter_model.safetensors"
    assert (again / name).read_bytes() == (tmp_path / "run" / name).read_bytes()

    capsys.readouterr()
    assert run("eval", tmp_path / "run", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["measures"]["loss"]["n"] == held_out["num_rows"]
    logged = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    expected = pytest.approx(json.loads(logged[-1])["eval_loss"], rel=1e-12)
    assert report["models"]["tuned"]["loss"]["value"] == expected


def test_a_bad_row_is_named_before_any_weight_is_loaded(
    recipe: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny_model, tmp_path / "weightless")
    (tmp_path / "weightless" / "model.safetensors").write_bytes(b"to read it would be an error")
    code = run(
        "train", recipe, "--set", "data.on_bad_row=stop",
        "--set", "data.evaluation_share=null", "--set", f"model.path={tmp_path / 'weightless'}",
    )  # fmt: skip
    error = capsys.readouterr().err
    assert code == 2
    assert f"{tmp_path / 'rows.jsonl'}:17: field 'messages[0].role': got 'humain'" in error
    assert "on_bad_row: skip" in error
