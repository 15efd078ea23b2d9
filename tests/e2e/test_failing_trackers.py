"""Failing trackers and evaluations do not cost any training."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_cli.loop.trackers import Console, Fanout, Jsonl
from tests.conftest import exit_code

WEIGHTS = "last/adapter_model.safetensors"
STEP = {"loss": 1.0}


class Broken:
    """A tracker that fails after some time, like one whose server goes away."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.is_away = False

    def log(self, metrics: Any, step: int) -> None:
        if self.is_away:
            raise ConnectionError("the server is away")
        self.steps.append(step)

    def close(self) -> None:
        raise TimeoutError("the server is away")


def test_a_failing_tracker_is_warned_of_once_and_the_others_continue(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken, whole = Broken(), Jsonl(tmp_path / "metrics.jsonl", 0)
    fanout = Fanout([broken, whole])
    for step in range(5):
        broken.is_away = step in (1, 2)
        fanout.log(STEP, step)
    fanout.close()
    assert broken.steps == [0, 3, 4], "it is asked again"
    lines = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2, 3, 4]
    [warning] = [record.message for record in caplog.records]
    assert warning == (
        "Broken: metrics cannot be logged (ConnectionError: the server is away); training continues"
    )


def test_a_truncated_metrics_line_is_dropped_on_resume(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo', encoding="utf-8")
    tracker = Jsonl(path, 2)
    tracker.log(STEP, 3)
    tracker.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 3]


@pytest.mark.slow
def test_a_run_survives_a_closed_output_pipe(
    write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """`qlora train recipe.yaml 2>&1 | head -n 1`: the console is a closed pipe from then on."""
    recipe = write_recipe()
    assert exit_code("train", recipe, "--set", f"output.dir={tmp_path / 'whole'}") == 0
    command = [sys.executable, "-m", "qlora_cli", "train", str(recipe)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
        assert process.stderr is not None
        process.stderr.readline()
        process.stderr.close()
        process.wait(timeout=120)
    run = tmp_path / "run"
    assert json.loads((run / "run.json").read_text(encoding="utf-8"))["status"] == "finished"
    assert (run / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()


def test_best_weights_that_cannot_be_written_cost_no_step(
    write_recipe: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sections = {
        "training": {"max_steps": 6, "eval_every": 3, "save_every": 5},
        "adapter": {"dropout": 0.1},
    }
    recipe = write_recipe(**sections)
    run, whole = tmp_path / "run", tmp_path / "whole"
    assert exit_code("train", recipe) == 0
    run.rename(whole)

    log = Console.log

    def log_and_block(self: Any, metrics: Any, step: int) -> None:
        log(self, metrics, step)
        if step == 2:
            # A file in place of the folder cannot be written to, like a full disk.
            (run / ".best.unfinished").write_text("", encoding="utf-8")

    monkeypatch.setattr(Console, "log", log_and_block)
    assert exit_code("train", recipe) == 4
    told = capsys.readouterr().err
    assert "the best weights cannot be written into" in told
    assert "Traceback" not in told
    monkeypatch.undo()
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000003"]
    os.unlink(run / ".best.unfinished")
    assert exit_code("train", recipe, "--resume", "auto") == 0
    for name in (WEIGHTS, "best/adapter_model.safetensors"):
        assert (run / name).read_bytes() == (whole / name).read_bytes()


def test_an_evaluation_that_fails_costs_no_step(
    write_recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Finite weights, so large that the loss on the held-out rows is not finite.
    recipe = write_recipe(
        optimizer={"learning_rate": 1e25},
        training={"max_steps": 2, "eval_every": 1, "save_every": None},
    )
    assert exit_code("train", recipe) == 4
    assert "the loss on the evaluation rows is nan" in capsys.readouterr().err
    checkpoints = tmp_path / "run" / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["step-00000001"]
