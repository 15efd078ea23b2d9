"""Log the progress of long work."""

from __future__ import annotations

import logging
import time

log = logging.getLogger("qlora")

_EVERY_SECONDS = 10.0
_MIN_SHARE = 0.05
"""Share of the work after which the time left is estimated: the first part is slower."""


class Progress:
    """Logs a line every ten seconds; shorter work logs nothing.

    Args:
        what: what is counted, such as `tuned: gsm8k`.
        total: how many there are.
    """

    def __init__(self, what: str, total: int) -> None:
        self._what = what
        self._total = total
        self._done = 0.0
        self._started = self._shown = time.monotonic()

    def add(self, number: float) -> None:
        """Count `number` more as done."""
        self._done += number
        now = time.monotonic()
        if now - self._shown < _EVERY_SECONDS or self._done >= self._total:
            return
        self._shown = now
        left = (now - self._started) / self._done * (self._total - self._done)
        minutes, seconds = divmod(round(left), 60)
        text = f"about {minutes}:{seconds:02d} left"
        is_early = self._done < _MIN_SHARE * self._total
        log.info(
            "%s: %d of %d%s", self._what, self._done, self._total, "" if is_early else f", {text}"
        )
