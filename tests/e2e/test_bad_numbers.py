"""Runs that hit NaNs, spikes or OOM for real: a damaged base, an odd row, a long row."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.conftest import exit_code, save_tiny_model

ODD = "~"
"""A letter that only some rows have."""


def rows_file(folder: Path, answers: list[str]) -> dict[str, Any]:
    path = folder / "answers.jsonl"
    rows = [
        {
            "messages": [
                {"role": "user", "content": "say"},
                {"role": "assistant", "content": answer},
            ]
        }
        for answer in answers
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {"train": {"path": str(path)}, "evaluation": None}


def damaged_base(folder: Path) -> Path:
    """A model whose loss is NaN for any row that contains the odd letter."""
    base = save_tiny_model(folder / "damaged")
    weights = load_file(base / "model.safetensors")
    # The tokenizer's vocabulary is the sorted alphabet of bytes, which begins with "!".
    weights["model.embed_tokens.weight"][ord(ODD) - ord("!")] = float("nan")
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    return base


def metrics(run: Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def adapter(run: Path) -> bytes:
    return (run / "last" / "adapter_model.safetensors").read_bytes()


def record(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "run.json").read_text(encoding="utf-8")))


def state(run: Path, step: int) -> dict[str, Any]:
    path = run / "checkpoints" / f"step-{step:08d}" / "state.json"
    tree = json.loads(path.read_text(encoding="utf-8"))
    return dict(dict(tree["dict"])["state"]["dict"])


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_nan_step_is_not_applied_and_its_row_is_named(
    write_recipe: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    packing: bool,
    precision: str,
) -> None:
    answers = ["ab ab", "cd cd cd", "gh", "ij ij", f"ef {ODD}"]
    recipe = write_recipe(
        model={"path": str(damaged_base(tmp_path))},
        data={**rows_file(tmp_path, answers), "packing": packing, "max_length": 70},
        training={
            "max_steps": None, "epochs": 1, "batch_size": 1, "micro_batch_size": 1,
            "log_every": 100, "precision": precision,
        },
    )  # fmt: skip
    assert exit_code("train", recipe) == 0
    summary, told = capsys.readouterr()
    assert "; 1 of the steps not applied" in summary
    assert record(tmp_path / "run")["steps_not_applied"] == 1
    assert "it was not applied; rows: " in told
    assert "the loss is nan, the gradient's norm nan" in told
    named = told.split("not applied; rows: ")[1].splitlines()[0].split(", ")
    assert f"{tmp_path}/answers.jsonl:5" in named
    # Packed, a row is named with those that share its forward.
    assert len(named) == 1 or packing
    rows = metrics(tmp_path / "run")
    assert sum(row["loss"] is None for row in rows) == 1, "logged as it is, and though not due"
    saved = load_file(tmp_path / "run" / "last" / "adapter_model.safetensors")
    assert all(tensor.isfinite().all() for tensor in saved.values())


@pytest.mark.parametrize("steps", [1, 2])
def test_a_run_without_an_applied_step_fails(
    write_recipe: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    steps: int,
) -> None:
    recipe = write_recipe(
        model={"path": str(damaged_base(tmp_path))},
        data=rows_file(tmp_path, [f"ef {ODD}"] * 4),
        training={"max_steps": steps},
    )
    run = tmp_path / "run"
    assert exit_code("train", recipe) == 4
    printed, told = capsys.readouterr()
    assert not printed
    assert f"no step was applied, of {steps}: the loss or the gradient was never finite" in told
    found = record(run)
    assert (found["status"], found["steps_not_applied"]) == ("failed", steps)
    assert not (run / "last").exists()
    assert not (run / "best").exists()
    assert exit_code("merge", run, "--output", tmp_path / "merged") == 2
    assert "no step of the run was applied" in capsys.readouterr().err
    assert exit_code("train", recipe, "--resume", "auto") == 4


def test_a_bad_step_does_not_affect_the_steps_around_it(
    write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    # Not among the first, on which the model has to show what it does with several in a row.
    answers = ["cd cd"] * 3 + [f"ab {ODD}"]
    sections = {
        "data": rows_file(tmp_path, answers),
        "training": {"max_steps": 8, "batch_size": 1, "micro_batch_size": 1},
        "model": {"path": str(damaged_base(tmp_path))},
    }
    assert exit_code("train", write_recipe(**sections)) == 0
    losses = [row["loss"] for row in metrics(tmp_path / "run") if "loss" in row]
    assert losses.count(None) == 2
    (tmp_path / "run").rename(tmp_path / "with")
    # All good rows are equal, so six steps without the bad row are the same six steps.
    sections["data"] = rows_file(tmp_path, ["cd cd"] * 4)
    sections["training"] = {**sections["training"], "max_steps": 6}
    assert exit_code("train", write_recipe(**sections)) == 0
    assert adapter(tmp_path / "run") == adapter(tmp_path / "with")


def test_too_many_bad_steps_in_a_row_end_a_run_and_leave_what_was_saved(
    write_recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(
        optimizer={"learning_rate": 1e30},
        training={"max_steps": 20, "save_every": 1, "max_bad_steps": 4, "max_grad_norm": None},
        output={"keep_checkpoints": 1},
    )
    assert exit_code("train", recipe) == 4
    told = capsys.readouterr().err
    assert "That is 4 in a row (training.max_bad_steps)" in told
    assert "(in float32)" in told
    kept = [path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*")]
    first_bad = next(row["step"] for row in metrics(tmp_path / "run") if row.get("loss", 0) is None)
    assert kept == [f"step-{first_bad - 1:08d}"]


def spiking(tmp_path: Path, **spike: Any) -> dict[str, Any]:
    """Seventy equal rows and one outlier, one row per step."""
    return {
        "data": rows_file(tmp_path, ["ab ab ab"] * 70 + ["QXZ%&?@" * 4]),
        "adapter": {"dropout": 0.1},
        "optimizer": {"learning_rate": 3e-3},
        "training": {
            "max_steps": None, "epochs": 1, "batch_size": 1, "micro_batch_size": 1, "seed": 3,
            "save_every": 1, "spike": {"steps": 1, "factor": 2.5, **spike},
        },
    }  # fmt: skip


def test_a_spike_is_reported_with_its_rows(
    write_recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code("train", write_recipe(**spiking(tmp_path))) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if "running median" in line]
    assert len(told) == 1
    assert f"rows: {tmp_path}/answers.jsonl:71" in told[0]


@pytest.mark.slow
def test_a_run_rolls_back_and_skips_the_rows_of_a_spike(
    write_recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sections = spiking(tmp_path, action="go_back")
    assert exit_code("train", write_recipe(**sections)) == 0
    told = capsys.readouterr().err
    assert "skipping the rows of 1 steps" in told
    step = int(told.split("Going back to step ")[1].split()[0])
    ended = state(tmp_path / "run", 71)
    assert (ended["passed_over"], ended["returns"]) == (1, 1)
    (tmp_path / "run").rename(tmp_path / "whole")

    # The same as a run over rows without it, with its own dropout from there on.
    sections["data"] = rows_file(tmp_path, ["ab ab ab"] * 71)
    assert exit_code("train", write_recipe(**sections)) == 0
    assert adapter(tmp_path / "run") == adapter(tmp_path / "whole")
    (tmp_path / "run").rename(tmp_path / "equal")

    # A run that is stopped on the way there resumes to the same result.
    sections = spiking(tmp_path, action="go_back")
    sections["training"] |= {"epochs": None, "max_steps": step + 2}
    assert exit_code("train", write_recipe(**sections)) == 0
    sections["training"]["max_steps"] = 71
    assert exit_code("train", write_recipe(**sections), "--resume", "auto") == 0
    assert adapter(tmp_path / "run") == adapter(tmp_path / "whole")


@pytest.mark.slow
def test_the_number_of_rollbacks_is_limited(
    write_recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sections = spiking(tmp_path, action="go_back", returns=1)
    sections["data"] = rows_file(tmp_path, ["ab ab ab"] * 68 + ["QXZ%&?@" * 4] * 3)
    assert exit_code("train", write_recipe(**sections)) == 4
    assert "the run has already been rolled back 1 times" in capsys.readouterr().err


_SHORT_OF_MEMORY = """
import resource, sys
import bitsandbytes, datasets, peft, transformers, torch
from qlora_cli import train, evaluate
from qlora_cli.cli import main

used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 1500 * 2**20,) * 2)
main(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_running_out_of_memory_saves_the_steps_before(
    write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    base = save_tiny_model(tmp_path / "base", max_position_embeddings=16384)
    sections: dict[str, Any] = {
        "model": {"path": str(base), "attention": "eager"},
        "adapter": {"dropout": 0.1},
        "data": {**rows_file(tmp_path, ["ab ab ab"] * 5 + ["cd" * 6000]), "max_length": 16384},
        "training": {
            "max_steps": None,
            "epochs": 1,
            "batch_size": 2,
            "micro_batch_size": 2,
            "seed": 2,
        },
    }
    command = [sys.executable, "-c", _SHORT_OF_MEMORY, "train", str(write_recipe(**sections))]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 6, ended.stderr
    error = ended.stderr[ended.stderr.index("error: ") :]
    done = int(error.split("out of memory in step ")[1].split(",")[0]) - 1
    assert "2 x 12" in error
    assert f"the {done} steps before it are saved" in error
    assert "base weights 0." in error
    assert "--set training.micro_batch_size=1" in error
    assert "--set training.gradient_checkpointing=true" in error
    assert "Traceback" not in ended.stderr

    # What was saved is what a run without the long row had then.
    run = tmp_path / "run"
    saved = run / "checkpoints" / f"step-{done:08d}" / "trained.safetensors"
    kept = saved.read_bytes()
    run.rename(tmp_path / "ended")
    sections["data"] = {**rows_file(tmp_path, ["ab ab ab"] * 6), "max_length": 16384}
    sections["training"] |= {"save_every": 1}
    sections["output"] = {"keep_checkpoints": 9}
    assert exit_code("train", write_recipe(**sections)) == 0
    assert saved.read_bytes() == kept
