"""Ctrl-C, SIGTERM and a deadline: a run ends after its step, and saved. Asked again, at once."""

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
    """Takes signals while it is entered.

    Args:
        stop_after: seconds from now after which the run is to end; None never.
    """

    def __init__(self, stop_after: float | None = None) -> None:
        self._deadline = None if stop_after is None else time.monotonic() + stop_after
        self._asked: Interrupted | None = None
        self._is_patient = False
        self._before: dict[signal.Signals, Any] = {}

    @property
    def asked(self) -> Interrupted | None:
        """Why the run is to end after this step, if it is."""
        is_late = self._deadline is not None and time.monotonic() > self._deadline
        if self._asked is None and is_late:
            self._asked = Interrupted("training.stop_after is over", EXIT_DEADLINE)
        return self._asked

    @contextmanager
    def after_the_step(self) -> Iterator[None]:
        """In here a first signal only asks: there is something to save."""
        was_patient, self._is_patient = self._is_patient, True
        try:
            yield
        finally:
            self._is_patient = was_patient

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """In here nothing is lost, so nobody has to wait.

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
