"""Record the bytes allocated by torch on the CPU over time.

This includes memory that a count of operations misses: tensors made by compiled code, and
allocations inside kernels. The profiler needs memory itself, so do not measure the resident set at
the same time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Self

import torch

from qlora_cli.plan.trace.memory_counter import MemoryCounter


class Marked(MemoryCounter):
    """A memory counter that marks its stages for the profiler. It need not be entered."""

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Attribute everything inside this context to the stage."""
        with torch.profiler.record_function(_mark(name)), super().stage(name):
            yield


class Allocator:
    """Record allocations while the context is active.

    Args:
        held: bytes allocated before, which are counted too.
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
        """Return the peak of allocated bytes, within the stages of this name if given."""
        spans = [(e.start_ns(), e.end_ns()) for e in self._events if e.name() == _mark(stage or "")]
        return max(
            total
            for when, total in self._totals
            if stage is None or any(first <= when <= last for first, last in spans)
        )


def _mark(stage: str) -> str:
    return f"stage {stage}"
