"""Bytes that torch's allocator gave out on the CPU, moment by moment.

It sees what no operation shows: compiled code, which makes its tensors without an operation, and
what kernels allocate inside. Watching takes memory itself, so that the resident set says nothing
meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Self

import torch

from qlora_cli.plan.trace.memory_counter import MemoryCounter


class Marked(MemoryCounter):
    """A count that need not be entered: its stages are to be seen in what a profiler notes."""

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Attribute everything inside this context to the stage."""
        with torch.profiler.record_function(_mark(name)), super().stage(name):
            yield


class Allocator:
    """Notes while it is entered.

    Args:
        held: bytes that were given out before, and are counted too.
    """

    def __init__(self, held: int = 0) -> None:
        self._held = held
        self._profile = torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        )

    def __enter__(self) -> Self:
        self._profile.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._profile.__exit__(None, None, None)
        assert self._profile.profiler is not None
        self._events = list(self._profile.profiler.kineto_results.events())
        changes = sorted(
            (event.start_ns(), event.nbytes())
            for event in self._events
            if event.name() == "[memory]"
        )
        totals = accumulate((change for _, change in changes), initial=self._held)
        next(totals)
        self._totals = list(zip((when for when, _ in changes), totals, strict=True))

    def peak(self, stage: str | None = None) -> int:
        """The most that was given out at once, in the stages of this name (of a `Marked` count)."""
        spans = [(e.start_ns(), e.end_ns()) for e in self._events if e.name() == _mark(stage or "")]
        return max(
            total
            for when, total in self._totals
            if stage is None or any(first <= when <= last for first, last in spans)
        )


def _mark(stage: str) -> str:
    return f"stage {stage}"
