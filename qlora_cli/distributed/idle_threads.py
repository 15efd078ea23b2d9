"""Let waiting threads sleep while other processes need the CPU."""

from __future__ import annotations

import math
import os
import sys
import threading
import time

import psutil
import torch

_SECONDS = 0.5
"""Time between two looks at the load."""

_OTHERS = 0.25
"""CPUs that other processes must use before threads sleep."""

_VALUES_PER_THREAD = 32768
"""Values from which torch takes one more thread for an element-wise operation."""

_started = threading.Lock()


def share_cpu() -> None:
    """Watch the load from now on, in the background; call it once or more often.

    At the end of each operation, OpenMP's threads spin for some milliseconds before they sleep. On
    a machine of their own that saves some 15 % of the time. Where two runs share the CPUs, a thread
    spins on a CPU that the thread it waits for could use, and each run gets half of its share
    (`benchmarks/shared_cpu.md`). Results are the same whether threads spin or sleep.

    OpenMP reads its settings once, when torch is loaded. But with more threads than CPUs, GNU's
    OpenMP spins 100 times instead of 300,000. So while others need the CPU, a second pool of
    threads exists that does nothing. A user's own OMP_WAIT_POLICY or GOMP_SPINCOUNT is left alone.
    """
    is_set = "OMP_WAIT_POLICY" in os.environ or "GOMP_SPINCOUNT" in os.environ
    if sys.platform != "linux" or is_set or not _started.acquire(blocking=False):
        return
    threading.Thread(target=_watch, name="cpu-load", daemon=True).start()


def _watch() -> None:
    pools: list[IdlePool] = []
    before = _clocks()
    while True:
        time.sleep(_SECONDS)
        now = _clocks()
        wall, busy, own = (new - old for new, old in zip(now, before, strict=True))
        before = now
        wanted = idle_pools((busy - own) / wall, torch.get_num_threads(), _available_cpus())
        while len(pools) < wanted:
            pools.append(IdlePool())
        while len(pools) > wanted:
            pools.pop().close()


def idle_pools(others: float, num_threads: int, num_cpus: int) -> int:
    """Return how many idle pools are needed for threads to sleep; 0 if they may spin.

    Args:
        others: CPUs that other processes use.
        num_threads: threads of an operation of this process.
        num_cpus: CPUs that this process may use.
    """
    is_crowded = others > _OTHERS and others + num_threads > num_cpus
    if not is_crowded or num_threads == 1:
        return 0
    # Each pool has all threads of an operation but the one that starts it.
    return max(1, math.ceil((num_cpus - num_threads + 1) / (num_threads - 1)))


class IdlePool:
    """A pool of OpenMP's threads that sleep until it is closed."""

    def __init__(self) -> None:
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._hold, name="idle-pool", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End its threads."""
        self._end.set()
        self._thread.join()

    def _hold(self) -> None:
        # The first operation in a thread makes its pool; it ends with the thread.
        torch.zeros(torch.get_num_threads() * _VALUES_PER_THREAD).add_(1)
        self._end.wait()


def _clocks() -> tuple[float, float, float]:
    """Return seconds: of the wall clock, of this process's CPUs at work, and of it at work.

    Work on CPUs that this process may not use (of other jobs on a cluster's node) takes nothing.
    """
    every = psutil.cpu_times(percpu=True)
    ours = [every[i] for i in os.sched_getaffinity(0) if i < len(every)]
    busy = sum(cpu.user + cpu.nice + cpu.system + cpu.irq + cpu.softirq for cpu in ours)
    return time.monotonic(), busy, time.process_time()


def _available_cpus() -> int:
    return len(os.sched_getaffinity(0))
