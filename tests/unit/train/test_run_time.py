"""The training time of a run adds up over its resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qlora_cli.runs.run_folder import RunFolder
from qlora_cli.train.run_time import RunTime


@pytest.mark.parametrize(
    ("record", "saves", "resumed_at", "before"),
    [
        ({}, [(2, 4.0), (4, 10.0)], 4, 10.0),
        ({}, [(2, 4.0), (4, 10.0)], 2, 4.0),  # the later steps are trained again
        ({}, [(2, 4.0), (4, 10.0)], 3, 4.0),  # killed before the time of step 3 was recorded
        ({}, [(2, 4.0)], 0, 0.0),
        # Records of earlier versions.
        ({"status": "training"}, [], 4, 0.0),
        ({"steps": 4, "seconds": 20.0}, [], 4, 20.0),
        ({"steps": 4, "seconds": 20.0}, [], 2, 0.0),
    ],
)
def test_the_time_before_a_resume_counts(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    record: dict[str, Any],
    saves: list[tuple[int, float]],
    resumed_at: int,
    before: float,
) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    run = RunFolder(tmp_path)
    run.update_record(**record)
    first = RunTime(run)
    first.start(0)
    for step, seconds in saves:
        now = 100.0 + seconds
        first.note(step, keep=2)
    now = 500.0  # killed in between
    again = RunTime(run)
    again.start(resumed_at)
    now = 505.0
    assert again.seconds == before + 5


@pytest.mark.parametrize("keep", [1, 2, 9])
def test_times_are_kept_as_long_as_checkpoints(tmp_path: Path, keep: int) -> None:
    run = RunFolder(tmp_path)
    run.update_record(status="training")
    clock = RunTime(run)
    for step in (5, 10, 15, 12):  # the run went back
        clock.note(step, keep=keep)
    kept = ["5", "10", "12"][-keep:]
    assert list(run.read_record()["checkpoint_seconds"]) == kept
