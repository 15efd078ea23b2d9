"""Log metrics.

To add a tracker: one class here, its name in `open_trackers`, and in `Output.trackers` of the
recipe.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Protocol

from qlora_cli.common.atomic_files import atomic_file, write_file
from qlora_cli.common.formatting import size_text

log = logging.getLogger("qlora")

Metrics = Mapping[str, float]

_MIN_TIMED = 5
"""Steps after the first that an estimate of the time left is based on; fewer in a short run."""


class Tracker(Protocol):
    """Log the metrics of a step, as numbers on the host."""

    def log(self, metrics: Metrics, step: int) -> None: ...

    def close(self) -> None: ...


class Console:
    """Show a live line on a terminal; elsewhere print one line per logged step.

    Args:
        stream: usually standard error, as standard output is for results.
        max_steps: steps of the whole run, to estimate the time left.
    """

    def __init__(self, stream: IO[str], max_steps: int, first_step: int = 0) -> None:
        self._stream = stream
        self._is_live = stream.isatty()
        self._max_steps = max_steps
        self._first_step = first_step
        self._timed: tuple[int, float] | None = None
        """The first step that was logged, and when: it also took what comes before all steps."""
        self._width = 0

    def log(self, metrics: Metrics, step: int) -> None:
        if "loss" in metrics:
            self._write(self._progress(metrics, step), stays=not self._is_live)
        elif any(name.startswith("eval_") for name in metrics):  # not what is only kept in files
            shown = "  ".join(
                f"{name} {value:,}" if isinstance(value, int) else f"{name} {value:.4f}"
                for name, value in metrics.items()
            )
            self._write(f"step {step}  {shown}", stays=True)

    def close(self) -> None:
        if self._width:
            self._stream.write("\n")

    def _progress(self, metrics: Metrics, step: int) -> str:
        return (
            f"step {step}/{self._max_steps}  loss {metrics['loss']:.4f}  "
            f"{_shown(metrics, 'accuracy', 'margin')}lr {metrics['learning_rate']:.2e}  "
            f"{metrics['tokens_per_second']:,.0f} tokens/s  "
            f"{size_text(metrics['peak_memory_bytes'])}{self._time_left(step)}"
        )

    def _time_left(self, step: int) -> str:
        """Estimate the time left, once the steps that were timed are enough for that."""
        now = time.monotonic()
        if self._timed is None:
            self._timed = step, now
        first, since = self._timed
        if step - first < min(_MIN_TIMED, max(1, (self._max_steps - self._first_step) // 4)):
            return ""
        seconds = (now - since) / (step - first) * (self._max_steps - step)
        minutes, seconds = divmod(round(seconds), 60)
        hours, minutes = divmod(minutes, 60)
        left = f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
        return f"  {left} left"

    def _write(self, line: str, *, stays: bool) -> None:
        if not self._is_live:
            print(line, file=self._stream, flush=True)
            return
        # Padded with blanks to erase the rest of a longer previous line.
        self._stream.write("\r" + line.ljust(self._width) + ("\n" if stays else ""))
        self._stream.flush()
        self._width = 0 if stays else len(line)


def _shown(metrics: Metrics, *names: str) -> str:
    return "".join(f"{name} {metrics[name]:.4f}  " for name in names if name in metrics)


class FallingAnswers:
    """Warn once when the chosen answers of pairs become much less likely.

    A preference loss only sees the difference of two answers: it also falls if both become less
    likely, the rejected one faster (Pal et al. 2024, section 3).

    Args:
        max_fall: nats per answer, mean over the pairs of an evaluation (or of a step, where the
            loss has a reference).
        rows: earlier lines of `metrics.jsonl`, whose first evaluation is the start.
    """

    def __init__(self, max_fall: float, rows: Sequence[Metrics]) -> None:
        self._max_fall = max_fall
        self._first = next((row[_LOGP] for row in rows if _LOGP in row), None)
        self._has_warned = False

    def log(self, metrics: Metrics, step: int) -> None:
        change = metrics.get("chosen_change")
        if _LOGP in metrics:
            if self._first is None:
                self._first = metrics[_LOGP]
            change = metrics[_LOGP] - self._first
        if change is None or change >= -self._max_fall or self._has_warned:
            return
        self._has_warned = True
        log.warning(
            "step %d: the chosen answers are %.1f nats less likely than at the start (more than "
            "objective.max_fall %g): the model may write neither answer any more. Raise "
            "objective.sft_weight, or lower optimizer.learning_rate",
            step,
            -change,
            self._max_fall,
        )

    def close(self) -> None:
        pass


_LOGP = "eval_logp_chosen"


class Jsonl:
    """Write one JSON object per line: `{"step": ..., metric: value, ...}`.

    Lines of steps after `first_step` are dropped, and so are evaluations of that step: a resumed
    run repeats them.
    """

    def __init__(self, path: Path, first_step: int) -> None:
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        kept = [line for line in lines if _is_done(line, first_step)]
        with atomic_file(path) as unfinished:
            write_file(unfinished, [f"{line}\n".encode() for line in kept])
        self._file = path.open("a", encoding="utf-8")

    def log(self, metrics: Metrics, step: int) -> None:
        # JSON has no infinity, which the first steps in fp16 may have as their gradient norm.
        values = {k: v if math.isfinite(v) else None for k, v in metrics.items()}
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        # Other programs can follow the run, and a killed run loses nothing.
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _is_done(line: str, first_step: int) -> bool:
    try:
        row: dict[str, float] = json.loads(line)
    except ValueError:  # the last line, cut short by a kill or a full disk
        return False
    return row["step"] < first_step or (row["step"] == first_step and "loss" in row)


class TensorBoard:
    """Event files for TensorBoard (needs the extra `tensorboard`)."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder))

    def log(self, metrics: Metrics, step: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class Fanout:
    """Log to several trackers. One that fails causes one warning, and does not end the run.

    It is tried again at the next step, because a disk may have space again and a server may be
    back.
    """

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = trackers
        self._failed: set[Tracker] = set()

    def log(self, metrics: Metrics, step: int) -> None:
        for tracker in self._trackers if metrics else ():
            self._try(tracker, partial(tracker.log, metrics, step))

    def close(self) -> None:
        for tracker in self._trackers:
            self._try(tracker, tracker.close)

    def _try(self, tracker: Tracker, act: Callable[[], None]) -> None:
        try:
            act()
        # Logging libraries raise anything: full disks, closed pipes, unreachable servers.
        except Exception as error:
            if tracker not in self._failed:
                self._failed.add(tracker)
                log.warning(
                    "%s: metrics cannot be logged (%s: %s); training continues",
                    type(tracker).__name__,
                    type(error).__name__,
                    error,
                )


def open_trackers(
    names: Sequence[str] | None,
    folder: Path,
    *,
    max_steps: int,
    first_step: int,
    max_fall: float | None = None,
) -> Tracker:
    """Open the console (unless the log is quiet), `metrics.jsonl` in `folder`, and those named.

    Args:
        names: None for a process that must not write.
        max_fall: nats by which chosen answers may become less likely without a warning.
    """
    if names is None:
        return Fanout([])
    path = folder / "metrics.jsonl"
    trackers: list[Tracker] = [Jsonl(path, first_step)]
    if max_fall is not None:
        earlier = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        trackers.append(FallingAnswers(max_fall, earlier))
    if logging.getLogger("qlora").isEnabledFor(logging.INFO):
        trackers.append(Console(sys.stderr, max_steps, first_step))
    if "tensorboard" in names:
        trackers.append(TensorBoard(folder / "tensorboard"))
    return Fanout(trackers)
