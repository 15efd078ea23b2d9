"""The short form of benchmarks/random_kills: SIGKILL at random moments changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.random_kills.examine import examine, is_same
from benchmarks.random_kills.experiment import Experiment, draw_aims, step_of, whole_checkpoints
from benchmarks.random_kills.forms import tiny_form
from benchmarks.random_kills.page import as_markdown


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_with_the_same_result(tmp_path: Path) -> None:
    form = tiny_form(tmp_path, kills=4, max_steps=8)
    report = examine(form, tmp_path, seed=5)
    assert len(report["kills"]) == 4
    assert any(kill["resumed_from_step"] for kill in report["kills"]), (
        "at least one run resumed from a checkpoint"
    )
    assert is_same(report), report
    assert "| in all | 4 |" in as_markdown({"tiny": report | {"note": "other work ran."}})

    # A difference in the compared files is detected.
    experiment = Experiment(form, tmp_path)
    experiment.manifests = whole_checkpoints(experiment.whole)
    assert not any(experiment.compare().values())
    weights = experiment.run / "last" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    lines = (experiment.run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    (experiment.run / "metrics.jsonl").write_text("\n".join(lines[:-1]), encoding="utf-8")
    state = experiment.run / "checkpoints" / "step-00000008" / "state.json"
    state.write_bytes(state.read_bytes()[:-1])
    (experiment.run / ".best.removed").write_text("", encoding="utf-8")
    (experiment.cache / "prepared" / ".left").write_text("", encoding="utf-8")
    assert experiment.compare() == {
        "weights": ["last/adapter_model.safetensors"],
        "checkpoints": [8],
        "metrics": ["number of rows"],
        "record": [],
        "files": [".best.removed"],
        "cache": ["prepared/.left"],
    }


@pytest.mark.parametrize(("kills", "max_steps"), [(4, 8), (20, 30), (50, 60)])
def test_kills_are_aimed_so_that_the_run_advances_to_its_end(kills: int, max_steps: int) -> None:
    aims = draw_aims(kills, max_steps, seed=1)
    assert aims == draw_aims(kills, max_steps, seed=1) != draw_aims(kills, max_steps, seed=2)
    assert len(aims) == kills
    steps = [aim.step for aim in aims if aim.step is not None]
    assert steps == sorted(steps)
    assert steps[-1] == max_steps, "the last ones fall after the last step"
    assert sum(aim.step is None for aim in aims) == round(kills / 4)
    assert any(aim.is_cold for aim in aims)
    assert all(0 <= aim.share < 1 for aim in aims)


@pytest.mark.parametrize(
    ("line", "step"),
    [
        ("step 3/12  loss 6.7248  lr 2.00e-04  766 tokens/s", 3),
        ("step 12  eval_loss 6.2509  eval_perplexity 518.5026", 12),
        ("resuming from runs/step-9/step-00000004 (the newest complete one): step 4 of 12", 4),
        ("evaluation data: 6 rows (0 too long, 0 left out), step 1 of none", None),
        ("one epoch: padding 1.0%", None),
    ],
)
def test_the_step_is_read_from_a_console_line(line: str, step: int | None) -> None:
    assert step_of(line) == step
