import io
import json
from pathlib import Path

import pytest

from qlora_cli.loop.trackers import Console, Jsonl, TensorBoard, open_trackers

STEP = {
    "loss": 1.25,
    "learning_rate": 2e-4,
    "tokens_per_second": 1234.0,
    "peak_memory_bytes": 2.0 * 2**30,
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_off_a_terminal_each_step_is_one_plain_line() -> None:
    stream = io.StringIO()
    console = Console(stream, max_steps=10)
    console.log({"planned_memory_bytes": 2**20}, 0)
    console.log(STEP, 1)
    console.log({"eval_loss": 1.5}, 1)
    console.close()
    lines = stream.getvalue().splitlines()
    assert "\r" not in stream.getvalue()
    assert "\x1b" not in stream.getvalue()
    assert len(lines) == 2
    assert lines[0].startswith("step 1/10  loss 1.2500  lr 2.00e-04  1,234 tokens/s  2.00 GiB")
    assert lines[0].endswith("  2.00 GiB"), "one step is not enough for an estimate"
    assert lines[1] == "step 1  eval_loss 1.5000"


@pytest.mark.parametrize(("max_steps", "first_shown"), [(100, 6), (8, 3), (2, 2)])
def test_the_time_left_is_estimated_after_some_steps(max_steps: int, first_shown: int) -> None:
    stream = io.StringIO()
    console = Console(stream, max_steps)
    for step in range(1, max_steps + 1):
        console.log(STEP, step)
    shown = [line.endswith(" left") for line in stream.getvalue().splitlines()]
    assert shown.index(True) == first_shown - 1
    assert all(shown[first_shown - 1 :])


def test_the_first_step_does_not_count_for_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may take minutes: kernels are compiled in it."""
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    stream = io.StringIO()
    console = Console(stream, max_steps=26)
    for step in range(1, 7):
        now += 300 if step == 1 else 3
        console.log(STEP, step)
    assert stream.getvalue().splitlines()[-1].endswith("  1:00 left")


def test_on_a_terminal_steps_overwrite_one_line_and_evaluations_stay() -> None:
    stream = Terminal()
    console = Console(stream, max_steps=10)
    console.log(STEP, 1)
    console.log(STEP, 2)
    console.log({"eval_loss": 1.5}, 2)
    console.log(STEP, 3)
    console.close()
    # The second line holds the evaluation, blanks over what was longer before it.
    assert stream.getvalue().count("\n") == 2
    assert stream.getvalue().count("\r") == 4
    last = stream.getvalue().split("\r")[3]
    assert last.rstrip() == "step 2  eval_loss 1.5000"
    assert len(last) > len(last.rstrip())


def test_jsonl_drops_the_steps_that_a_resumed_run_repeats(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = Jsonl(path, first_step=0)
    for step in (1, 2, 3):
        first.log({"loss": float(step)}, step)
    first.close()
    resumed = Jsonl(path, first_step=2)
    resumed.log({"loss": 30.0}, 3)
    resumed.close()
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert rows == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0}, {"step": 3, "loss": 30.0}]


def test_jsonl_can_be_read_during_the_run(tmp_path: Path) -> None:
    tracker = Jsonl(tmp_path / "metrics.jsonl", first_step=0)
    tracker.log({"loss": 1.0}, 1)
    assert json.loads((tmp_path / "metrics.jsonl").read_text(encoding="utf-8"))["loss"] == 1.0
    tracker.close()


def test_tensorboard_gets_every_metric(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = TensorBoard(tmp_path)
    tracker.log({"loss": 1.0, "eval_loss": 2.0}, 7)
    tracker.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "eval_loss"}
    assert [(e.step, e.value) for e in events.Scalars("eval_loss")] == [(7, 2.0)]


def test_an_evaluation_without_metrics_is_not_logged(tmp_path: Path) -> None:
    tracker = open_trackers([], tmp_path, max_steps=1, first_step=0)
    tracker.log({}, 0)
    tracker.close()
    assert (tmp_path / "metrics.jsonl").read_text(encoding="utf-8") == ""
