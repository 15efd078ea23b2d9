"""A run that fails before its first step leaves no folder behind."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_cli.errors import Interrupted
from qlora_cli.runs.run_folder import RunFolder
from tests.conftest import exit_code

FAILURES: dict[str, dict[str, Any]] = {
    "no data": {"data": {"train": {"path": "nowhere.jsonl"}, "evaluation": None}},
    "bad rows": {"data": {"train": {"path": "bad.jsonl"}, "evaluation": None}},
    "no model": {"model": {"path": "./no/such/model"}},
    "no such module": {"adapter": {"target_modules": ["nothing"]}},
    "no such adapter": {"adapter": {"init_from": "./no/such/run"}},
    "no tracker": {"output": {"trackers": ["tensorboard"]}},
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("bad.jsonl").write_text('{"messages": 1}\n')
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "tensorboard" else found(name)
    )
    return tmp_path


@pytest.mark.parametrize("name", FAILURES)
def test_a_failed_start_leaves_no_folder(
    write_recipe: Callable[..., Path], folder: Path, name: str
) -> None:
    sections = FAILURES[name]
    run = folder / "new" / "runs" / "mine"
    recipe = write_recipe(**{**sections, "output": {"dir": str(run), **sections.get("output", {})}})
    assert exit_code("train", recipe) in (2, 3)
    assert not (folder / "new").exists()


def test_a_folder_that_was_there_stays(write_recipe: Callable[..., Path], folder: Path) -> None:
    run = folder / "empty"
    run.mkdir()
    recipe = write_recipe(**FAILURES["no data"], output={"dir": str(run)})
    assert exit_code("train", recipe) == 2
    assert list(run.iterdir()) == []


def test_ctrl_c_says_what_is_kept(folder: Path) -> None:
    run = RunFolder(folder / "new" / "run")

    def interrupt(*, resume: bool) -> str | None:
        with (
            pytest.raises(Interrupted) as caught,
            run.started(resume=resume, is_main=True),
            run.locked(),
        ):
            raise Interrupted("SIGINT", 130)
        return caught.value.kept

    assert interrupt(resume=False) == "nothing was kept of its result"
    assert not (folder / "new").exists()
    (run.checkpoints / "step-00000001").mkdir(parents=True)
    run.update_record(status="training")
    kept = interrupt(resume=True)
    assert kept is not None
    assert "are kept, and --resume auto continues" in kept
    assert run.record.exists()
