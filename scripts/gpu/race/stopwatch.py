"""Time the steps of a contestant, in the same way for all. Imports nothing of ours."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import torch

Rows = list[dict[str, list[int]]]

_WARM_UP = (2, 1)
"""Steps that are not timed, with all layers and with half of them."""


@dataclass
class Stopwatch:
    """Times steps with all layers of a model, then with the first half of them.

    The difference is the time of a layer, so that the time of a model with more layers follows.
    """

    decoder: Any
    """The module with `layers`."""
    device: torch.device
    timed: int
    """Timed steps of each half."""
    losses: list[float] = field(default_factory=list)
    seconds: tuple[list[float], list[float]] = field(default_factory=lambda: ([], []))
    memory: dict[str, int | None] = field(default_factory=dict)
    _done: int = 0
    _started: float = math.nan

    def __post_init__(self) -> None:
        self.num_layers = len(self.decoder.layers)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    @property
    def num_steps(self) -> int:
        """Number of steps to make."""
        return sum(_WARM_UP) + 2 * self.timed

    def begin(self) -> None:
        """Start a step."""
        self._wait()
        self._started = time.perf_counter()

    def end(self, loss: float | None = None) -> None:
        """End a step."""
        self._wait()
        seconds = time.perf_counter() - self._started
        if loss is not None:
            self.losses.append(loss)
        first = _WARM_UP[0] + self.timed
        if _WARM_UP[0] <= self._done < first:
            self.seconds[0].append(seconds)
        elif self._done >= first + _WARM_UP[1]:
            self.seconds[1].append(seconds)
        self._done += 1
        if self._done == first:
            self._measure_memory()
            self._halve()

    def result(self) -> dict[str, Any]:
        """Return what was measured."""
        whole, half = (statistics.median(one) for one in self.seconds)
        return {
            "layers": self.num_layers,
            "seconds": list(self.seconds),
            "step_seconds": whole,
            "half_seconds": half,
            "losses": self.losses,
            **self.memory,
        }

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _measure_memory(self) -> None:
        is_cuda = self.device.type == "cuda"
        self.memory = {
            "allocated_bytes": torch.cuda.max_memory_allocated() if is_cuda else None,
            "reserved_bytes": torch.cuda.max_memory_reserved() if is_cuda else None,
        }

    def _halve(self) -> None:
        self.decoder.layers = self.decoder.layers[: self.num_layers // 2]
        self.decoder.config.num_hidden_layers = self.num_layers // 2


def seconds_of(result: dict[str, Any], layers: int) -> float:
    """Extrapolate the seconds of a step to a model with more layers."""
    whole, half, measured = result["step_seconds"], result["half_seconds"], result["layers"]
    per_layer = max(0.0, (whole - half) / (measured - measured // 2))
    return float(whole + (layers - measured) * per_layer)
