"""Training time of a run, added up over its resumes."""

from __future__ import annotations

import time

from qlora_cli.runs.run_folder import RunFolder

_KEY = "checkpoint_seconds"


class RunTime:
    """Measures the training time of a run: steps, evaluations and saves.

    The times of the checkpoints are in the record of the run. The files of a checkpoint are bit
    for bit those of an uninterrupted run, so they hold no times.
    """

    def __init__(self, run: RunFolder) -> None:
        self._run = run
        self._before = 0.0
        self._since = time.monotonic()

    @property
    def seconds(self) -> float:
        """Training time so far, including that before a resume."""
        return self._before + time.monotonic() - self._since

    def start(self, step: int) -> None:
        """Start the clock at a step: 0, or that of the checkpoint that the run resumes from.

        Time since the last checkpoint is lost in a kill. Runs recorded without times of their
        checkpoints start at zero, unless they were finished.
        """
        known = self._known() if step else {}
        self._before = next((known[at] for at in sorted(known, reverse=True) if at <= step), 0.0)
        self._since = time.monotonic()

    def note(self, step: int, keep: int) -> None:
        """Record the time of a checkpoint that was just saved.

        Args:
            keep: number of checkpoints that are kept.
        """
        earlier = sorted((at, known) for at, known in self._known().items() if at < step)
        kept = [*earlier, (step, round(self.seconds, 1))][-keep:]
        self._run.update_record(**{_KEY: {str(at): seconds for at, seconds in kept}})

    def _known(self) -> dict[int, float]:
        """Return the recorded time at the end of steps."""
        record = self._run.read_record()
        finished = {record["steps"]: record["seconds"]} if "seconds" in record else {}
        return finished | {int(at): seconds for at, seconds in record.get(_KEY, {}).items()}
