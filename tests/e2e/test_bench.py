"""`qlora bench`, from the command line."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import exit_code, output_of


def test_a_bench_measures_the_steps_of_the_recipe_and_leaves_nothing(
    write_recipe: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    recipe = write_recipe(training={"max_steps": 3, "save_every": 1, "eval_every": 1})
    assert exit_code("train", recipe) == 0
    before = sorted(tmp_path.rglob("*"))
    report = output_of(capsys, "bench", recipe, "--steps", "3")
    assert sorted(tmp_path.rglob("*")) == before
    speed = report["tokens_per_second"]
    assert 0 < speed["least"] <= speed["median"] <= speed["most"]
    assert report["seconds_to_first_step"] > 0
    assert report["kernels"] == "fused"
    # The same steps as in the run.
    lines = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8")
    assert all(f'"loss": {loss}' in lines for loss in report["losses"])
    assert len(report["losses"]) == 3


def test_a_bench_is_printed_as_text(
    write_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(training={"kernels": "plain"})
    assert exit_code("bench", recipe, "--steps", "2", "--set", "training.micro_batch_size=4") == 0
    told = capsys.readouterr().out
    assert "tokens/s" in told
    assert "1 steps after the first), kernels plain" in told
