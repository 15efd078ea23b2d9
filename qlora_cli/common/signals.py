"""Stop a run on Ctrl-C, SIGTERM or a deadline: after its step and a save; if repeated, at once."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self

from qlora_cli.errors import EXIT_DEADLINE, EXIT_SIGNAL, Interrupted

log = logging.getLogger("qlora")

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """Handles signals while it is entered.

    Args:
        stop_after: seconds from now until the run must end; None for no limit.
    """

    def __init__(self, stop_after: float | None = None) -> None:
        self._deadline = None if stop_after is None else time.monotonic() + stop_after
        self._asked: Interrupted | None = None
        self._is_patient = False
        self._before: dict[signal.Signals, Any] = {}

    @property
    def asked(self) -> Interrupted | None:
        """Reason to stop after this step, or None."""
        is_late = self._deadline is not None and time.monotonic() > self._deadline
        if self._asked is None and is_late:
            self._asked = Interrupted("training.stop_after is over", EXIT_DEADLINE)
        return self._asked

    @contextmanager
    def after_the_step(self) -> Iterator[None]:
        """Make a first signal wait for the end of the step, as there is something to save."""
        was_patient, self._is_patient = self._is_patient, True
        try:
            yield
        finally:
            self._is_patient = was_patient

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Let a signal end the process at once, as nothing would be lost.

        Raises:
            Interrupted: there was a signal, in here or before.
        """
        was_patient, self._is_patient = self._is_patient, False
        try:
            if self.asked is not None:
                raise self.asked
            yield
        finally:
            self._is_patient = was_patient

    def __enter__(self) -> Self:
        # Elsewhere than in the main thread no signal arrives.
        if threading.current_thread() is threading.main_thread():
            self._before = {each: signal.signal(each, self._take) for each in _SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for each, handler in self._before.items():
            signal.signal(each, handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        is_first, self._asked = self._asked is None, Interrupted(name, EXIT_SIGNAL + number)
        if not (is_first and self._is_patient):
            raise self._asked
        log.warning("%s: the run ends after this step, and is saved; once more ends it now", name)
