"""Run cells one at a time, each in its own process."""

from __future__ import annotations

import logging
import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from qlora_cli.compare.grid import Cell
from qlora_cli.compare.store import ResultStore
from qlora_cli.compare.worker import run_worker
from qlora_cli.errors import EXIT_DEADLINE, EXIT_SIGNAL, Interrupted

log = logging.getLogger("qlora")

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_LOOK_SECONDS = 0.2
"""Interval at which a running cell is checked."""


def run_in_subprocess(
    cell: Cell, root: Path, should_prune: Callable[[], bool] | None = None
) -> None:
    """Run the unfinished parts of a cell. A failure is saved with the cell.

    Args:
        root: folder of the comparison.
        should_prune: called repeatedly during training; if true, the run is saved and ended.

    Raises:
        Interrupted: by a signal, or by `training.stop_after`; the run is saved.
    """
    store = ResultStore(root, cell)
    if cell.recipe is None or store.is_done:
        log.info("%s: %s", cell.name, cell.error or "already done")
        return
    log.info("%s: starting", cell.name)
    store.save_failure(None)
    # Not by fork: a forked process keeps the locks of library threads, but not the threads.
    process = multiprocessing.get_context("spawn").Process(
        target=run_worker, args=(cell, root, log.level), name=cell.slug
    )
    process.start()
    is_pruned = False
    with _forward_signals(process.terminate) as received:
        while process.is_alive():
            process.join(_LOOK_SECONDS)
            if not is_pruned and not received and should_prune and should_prune():
                is_pruned = True
                process.terminate()
    if received:
        raise Interrupted(received[0].name, EXIT_SIGNAL + received[0])
    if process.exitcode == EXIT_DEADLINE:
        raise Interrupted("training.stop_after has passed", EXIT_DEADLINE)
    if is_pruned:
        store.save_failure({"error": "pruned by Optuna", "hint": None, "is_pruned": True})
    elif process.exitcode and store.failure() is None:
        store.save_failure(_exit_failure(process.exitcode))
    if failure := store.failure():
        log.warning("%s: %s", cell.name, failure["error"])


def _exit_failure(code: int) -> dict[str, object]:
    """Describe the end of a process that saved no failure."""
    how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
    hint = "probably killed by the OOM killer; qlora plan predicts how much memory the run needs"
    return {
        "error": f"its process ended {how}",
        "hint": hint if code == -signal.SIGKILL else None,
        "exit_code": code,
    }


@contextmanager
def _forward_signals(end: Callable[[], None]) -> Iterator[list[signal.Signals]]:
    """Forward signals to the run, which then ends. Yield the list of received signals."""
    received: list[signal.Signals] = []

    def take(number: int, frame: FrameType | None) -> None:
        received.append(signal.Signals(number))
        end()

    # Only the main thread receives signals.
    is_main = threading.current_thread() is threading.main_thread()
    before = {each: signal.signal(each, take) for each in _SIGNALS} if is_main else {}
    try:
        yield received
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
