"""Measure speed and memory between log lines."""

from __future__ import annotations

import time

from qlora_cli.distributed.world import World
from qlora_cli.types import TrainState


class Meter:
    """Add speed and memory to the metrics of a step."""

    def __init__(self, state: TrainState) -> None:
        self.restart(state)

    def restart(self, state: TrainState) -> None:
        """Start a new interval, so that time spent outside of steps does not count."""
        self._tokens = state.tokens
        self._since = time.monotonic()

    def read(self, metrics: dict[str, float], state: TrainState, world: World) -> dict[str, float]:
        """Return the metrics with speed (since the last reading), tokens so far and peak memory."""
        values = dict(metrics)
        seconds = time.monotonic() - self._since
        values["tokens_per_second"] = (state.tokens - self._tokens) / seconds
        values["tokens"] = state.tokens
        values |= world.peak_memory()
        self.restart(state)
        return values
