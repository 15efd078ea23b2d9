"""Description of the machine, and its load from other processes."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import psutil

MOST_BY_OTHERS = 0.05
"""Maximum share of CPU time that other processes may use in a valid run."""


@dataclass(frozen=True)
class Busy:
    """CPU seconds used on the whole machine, by all processes, and stolen."""

    used: float
    stolen: float

    @classmethod
    def now(cls) -> Busy:
        times = psutil.cpu_times()
        # The user time already includes the guests' time.
        left_out = ("guest", "guest_nice", "idle", "iowait", "steal")
        used = sum(value for name, value in times._asdict().items() if name not in left_out)
        return cls(used, times.steal)


def others_share(
    before: Busy, after: Busy, *, own_seconds: float, seconds: float, num_processors: int
) -> float:
    """Return the share of CPU time used by other processes, including stolen time."""
    others = after.used - before.used - own_seconds + after.stolen - before.stolen
    return max(0.0, others) / (seconds * num_processors)


def share_before(seconds: float = 1.0) -> float:
    """Return the share of CPU time used while this process sleeps."""
    before, started = Busy.now(), time.perf_counter()
    time.sleep(seconds)
    return others_share(
        before,
        Busy.now(),
        own_seconds=0.0,
        seconds=time.perf_counter() - started,
        num_processors=os.cpu_count() or 1,
    )
