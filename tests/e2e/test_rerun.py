"""A run once more: the same result, or what is different."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_cli.runs.run_folder import environment
from tests.conftest import exit_code, output_of, save_tiny_model


@pytest.fixture
def run(write_recipe: Callable[..., Path], tmp_path: Path) -> Path:
    """A finished run over a base of its own."""
    base = save_tiny_model(tmp_path / "base")
    recipe = write_recipe(
        model={"path": str(base)},
        adapter={"dropout": 0.1},
        quantization={"type": "nf4"},
        training={"max_steps": 4, "save_every": 2, "eval_every": 2, "stop_after": "9h"},
    )
    assert exit_code("train", recipe) == 0
    return tmp_path / "run"


def change_record(run: Path, **values: Any) -> None:
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    (run / "run.json").write_text(json.dumps({**record, **values}), encoding="utf-8")


def test_a_repeated_run_has_the_same_result(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    report = output_of(capsys, "rerun", run)
    same = {"is_same": True, "largest_difference": 0.0}
    assert report == {
        "run": str(run),
        "again": str(tmp_path / "run-again"),
        "is_same": True,
        "different": {},
        "weights": {"last": same, "best": same},
        "metrics": {"is_same": True, "rows": 7, "first": None},
    }
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    # What was repeated can be repeated, to any place, and is not written over.
    assert exit_code("rerun", tmp_path / "run-again", "--output", tmp_path / "third") == 0
    assert "third is identical to" in capsys.readouterr().out
    assert exit_code("rerun", run) == 2
    assert "run-again already holds a run" in capsys.readouterr().err


def test_a_resumed_run_is_repeated_uninterrupted(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code("train", run / "recipe.yaml", "--resume", "2") == 0
    report = output_of(capsys, "rerun", run)
    assert report["is_same"]
    assert report["different"] == {}


def test_another_base_is_listed_first_and_the_result_differs(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tiny_model(tmp_path / "base", initializer_range=0.1)
    capsys.readouterr()
    assert exit_code("rerun", run, "--json") == 7
    told = capsys.readouterr()
    report = json.loads(told.out)
    assert set(report["different"]) == {"the weights of model.path"}
    assert not report["is_same"]
    assert report["weights"]["last"]["largest_difference"] > 0
    assert report["metrics"]["first"]["step"] == 0
    old, new = report["metrics"]["first"]["eval_loss"]
    assert old != new
    assert told.err.index("changed: the weights of model.path") < told.err.index("step 1/4")


def test_other_versions_are_listed_and_need_not_matter(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packages = json.loads((run / "run.json").read_text(encoding="utf-8"))["packages"]
    change_record(run, packages={**packages, "torch": "1.0"}, gpus=["a card"], processes=2)
    report = output_of(capsys, "rerun", run)
    assert report["different"] == {
        "packages.torch": ["1.0", packages["torch"]],
        "gpus": [["a card"], []],
        "processes": [2, 1],
    }
    assert report["is_same"]
    assert exit_code("rerun", run, "--output", tmp_path / "text") == 0
    assert "changed: packages.torch: 1.0 -> " in capsys.readouterr().out


def test_settings_changed_on_resume_are_listed(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = ("--set", "optimizer.learning_rate=1e-3", "--allow", "optimizer.learning_rate")
    assert exit_code("train", run / "recipe.yaml", "--resume", "2", *changed) == 0
    capsys.readouterr()
    assert exit_code("rerun", run, "--json") == 7
    report = json.loads(capsys.readouterr().out)
    key = "optimizer.learning_rate, since step 2 of the first run"
    assert report["different"] == {key: [1e-2, 1e-3]}
    assert report["metrics"]["first"]["step"] == 1


def test_a_run_that_has_not_finished_is_not_repeated(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change_record(run, status="training")
    assert exit_code("rerun", run) == 2
    assert "has not finished" in capsys.readouterr().err
    assert exit_code("rerun", tmp_path / "nowhere") == 2
    assert not (tmp_path / "run-again").exists()


def test_the_record_names_the_commit_of_the_users_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert environment()["commit"] is None

    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=test", "-c", "user.email=test@example.org")
        done = subprocess.run(
            ["git", *identity, *arguments], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    (tmp_path / "recipe.yaml").write_text("a", encoding="utf-8")
    git("init")
    git("add", "recipe.yaml")
    git("commit", "-m", "A recipe")
    head = git("rev-parse", "HEAD")
    assert environment()["commit"] == head
    (tmp_path / "recipe.yaml").write_text("b", encoding="utf-8")
    assert environment()["commit"] == f"{head}-dirty"
