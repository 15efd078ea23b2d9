"""Cells take turns: one at a time, each in a process of its own."""

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
"""How often a run is looked at while it goes on."""


def never() -> bool:
    """No run is ended early."""
    return False


def run_in_subprocess(cell: Cell, root: Path, should_prune: Callable[[], bool] = never) -> None:
    """Run a cell, as far as that is not done. What fails is written down beside it.

    Args:
        root: folder of the comparison.
        is_enough: asked again and again while it is trained; true ends it, saved.

    Raises:
        Interrupted: by a signal, or by `training.stop_after`; what was learnt is saved.
    """
    store = ResultStore(root, cell)
    if cell.recipe is None or store.is_done:
        log.info("%s: %s", cell.name, cell.error or "done before")
        return
    log.info("%s: begins", cell.name)
    store.save_failure(None)
    # Never by fork: threads of libraries do not live on in a copy, and the locks they held do.
    process = multiprocessing.get_context("spawn").Process(
        target=run_worker, args=(cell, root, log.level), name=cell.slug
    )
    process.start()
    is_pruned = False
    with _forward_signals(process.terminate) as asked:
        while process.is_alive():
            process.join(_LOOK_SECONDS)
            if not is_pruned and not asked and should_prune():
                is_pruned = True
                process.terminate()
    if asked:
        raise Interrupted(asked[0].name, EXIT_SIGNAL + asked[0])
    if process.exitcode == EXIT_DEADLINE:
        raise Interrupted("training.stop_after is over", EXIT_DEADLINE)
    if is_pruned:
        store.save_failure({"error": "no promise at this step", "hint": None, "is_pruned": True})
    elif process.exitcode and store.failure() is None:
        store.save_failure(_exit_failure(process.exitcode))
    if failure := store.failure():
        log.warning("%s: %s", cell.name, failure["error"])


def _exit_failure(code: int) -> dict[str, object]:
    """Of a process that had no time to say anything."""
    how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
    hint = "the system may have ended it for want of memory: qlora plan says what it takes"
    return {
        "error": f"its process ended {how}",
        "hint": hint if code == -signal.SIGKILL else None,
        "exit_code": code,
    }


@contextmanager
def _forward_signals(end: Callable[[], None]) -> Iterator[list[signal.Signals]]:
    """Signals in here ask the run to end; again, at once. Yields those that came."""
    asked: list[signal.Signals] = []

    def take(number: int, frame: FrameType | None) -> None:
        asked.append(signal.Signals(number))
        end()

    # Elsewhere than in the main thread no signal arrives.
    is_main = threading.current_thread() is threading.main_thread()
    before = {each: signal.signal(each, take) for each in _SIGNALS} if is_main else {}
    try:
        yield asked
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
