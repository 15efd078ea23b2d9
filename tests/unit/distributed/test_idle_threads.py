"""Test when threads sleep instead of spinning."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace

import psutil
import pytest
import torch

from qlora_cli.distributed.idle_threads import IdlePool, _clocks, idle_pools


@pytest.mark.parametrize(
    ("others", "num_threads", "num_cpus", "pools"),
    [
        (0.0, 2, 2, 0),  # alone
        (0.1, 2, 2, 0),  # a clock and a log
        (1.0, 2, 2, 1),  # a second run
        (1.0, 2, 4, 0),  # there is room for both
        (3.0, 2, 4, 3),
        (1.0, 8, 8, 1),
        (5.0, 4, 8, 2),
        (1.0, 1, 1, 0),  # a single thread never waits
        (2.0, 4, 2, 1),  # more threads than CPUs sleep anyway
    ],
)
def test_idle_pools_exist_while_others_need_the_cpu(
    others: float, num_threads: int, num_cpus: int, pools: int
) -> None:
    assert idle_pools(others, num_threads, num_cpus) == pools
    if pools:  # GNU's OpenMP counts the main thread and, of each pool, all but the first
        assert 1 + (pools + 1) * (num_threads - 1) > num_cpus


def test_a_pool_has_threads_until_it_is_closed() -> None:
    threads = torch.get_num_threads()
    torch.zeros(threads * 32768).add_(1)  # the pool of this thread
    before = psutil.Process().num_threads()
    pools = [IdlePool() for _ in range(3)]
    # More than one each, since other threads of the process may end or start meanwhile.
    assert wait_until(lambda: psutil.Process().num_threads() > before + threads)
    for pool in pools:
        pool.close()
    assert wait_until(lambda: psutil.Process().num_threads() <= before + threads)


@pytest.mark.parametrize("cpus", [{0}, {1, 2}, {0, 1, 2, 3}, {1, 99}])
def test_work_on_cpus_of_other_jobs_does_not_count(
    cpus: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def times(percpu: bool) -> list[SimpleNamespace]:
        assert percpu
        return [SimpleNamespace(user=10.0**i, nice=0, system=0, irq=0, softirq=0) for i in range(4)]

    monkeypatch.setattr(psutil, "cpu_times", times)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: cpus, raising=False)
    assert _clocks()[1] == sum(10.0**i for i in cpus if i < 4)


def wait_until(holds: Callable[[], bool]) -> bool:
    """Wait for ten seconds at most; return whether it holds."""
    for _ in range(200):
        if holds():
            return True
        time.sleep(0.05)
    return False
