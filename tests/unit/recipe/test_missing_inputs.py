"""Local files that a recipe names and that are not here: validate warns, and --deep refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_cli.cli import main
from qlora_cli.common.user_paths import similar_path
from qlora_cli.recipe.load import LoadedRecipe
from qlora_cli.recipe.missing_inputs import missing_inputs, recipe_inputs
from tests.unit.recipe.test_path_keys import PATHS

INPUTS = {key: override for key, override in PATHS.items() if key != "output.dir"}
"""Keys whose path a run reads -> an override that sets one."""

RECIPE = "model: {path: base}\ndata: {train: {path: rows.jsonl}}\noutput: {dir: run}\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make the working folder, with rows.jsonl and a folder `data`."""
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text("{}\n", encoding="utf-8")
    Path("data").mkdir()
    Path("data/train.csv").write_text("a\n", encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("key", INPUTS)
def test_each_path_that_a_run_reads_is_found_missing(
    folder: Path, load: Callable[..., LoadedRecipe], key: str
) -> None:
    recipe = load(RECIPE, INPUTS[key].format("data/nothing.gguf")).recipe
    [found] = missing_inputs(recipe)
    assert (found.key.replace("[0]", ""), found.path) == (key, "data/nothing.gguf")
    Path("data/nothing.gguf").touch()
    assert not missing_inputs(recipe)
    assert found.key in [one.key for one in recipe_inputs(recipe)]


@pytest.mark.parametrize(
    ("path", "is_missing"),
    [
        ("rows.jsonl", False),
        ("data", False),
        ("data/*.csv", False),
        ("data/*.parquet", True),
        ("data/missing", True),
        ("./rows", True),
        ("owner/name", False),  # a dataset on the Hub
        ("/nowhere/rows", True),
    ],
)
def test_ids_of_the_hub_are_not_missing_files(
    folder: Path, load: Callable[..., LoadedRecipe], path: str, is_missing: bool
) -> None:
    recipe = load(RECIPE, f"data.train=[{{path: '{path}'}}]").recipe
    assert [one.key for one in missing_inputs(recipe)] == ["data.train[0].path"] * is_missing


@pytest.mark.parametrize(
    ("path", "similar"),
    [
        ("row.jsonl", "rows.jsonl"),
        ("Rows.json", "rows.jsonl"),
        ("dat/train.csv", "data/train.csv"),
        ("data/train.cvs", "data/train.csv"),
        ("dta/nothing.csv", "data"),
        ("test.jsonl", None),
        ("rows.jsonl/x", None),
        ("/nowhere/at/all", None),
    ],
)
def test_the_most_similar_path_is_proposed(folder: Path, path: str, similar: str | None) -> None:
    assert similar_path(path) == similar


def test_validate_warns_with_the_line(
    folder: Path, load: Callable[..., LoadedRecipe], capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "configs").mkdir()
    text = RECIPE.replace("rows.jsonl}", "row.jsonl}, chat_template: t.jinja")
    Path("configs/recipe.yaml").write_text(text, encoding="utf-8")
    Path("configs/t.jinja").touch()

    def run(*options: str) -> tuple[object, str, str]:
        with pytest.raises(SystemExit) as exited:
            main(["validate", "configs/recipe.yaml", *options])
        return exited.value.code, *capsys.readouterr()

    code, out, err = run("--json")
    assert (code, json.loads(out)["recipe"]["data"]["train"]["path"]) == (0, "row.jsonl")
    lines = [
        'recipe.yaml:2  data.train.path: found "row.jsonl", and there is no such file or folder; '
        f"did you mean rows.jsonl? a relative path starts at the current folder, {folder}",
        'recipe.yaml:2  data.chat_template: found "t.jinja", and there is no such file or folder '
        f"in the current folder, {folder}; did you mean configs/t.jinja, beside the recipe?",
    ]
    assert err.splitlines() == lines
