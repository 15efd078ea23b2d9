"""Learning-rate schedules: pure functions of the step, so there is nothing to save or resume."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field

from qlora_cli.part import Part


class _Warmup(Part):
    warmup_steps: int = Field(0, ge=0)
    """Steps over which the learning rate grows linearly to its full value."""

    def _warmup(self, step: int) -> float:
        # The first step is not wasted on a learning rate of zero.
        return min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0

    def _progress(self, step: int, max_steps: int) -> float:
        """From 0 at the end of warm-up to just under 1 at the last step."""
        return max(0, step - self.warmup_steps) / max(1, max_steps - self.warmup_steps)


class Constant(_Warmup):
    """The full learning rate after warm-up."""

    type: Literal["constant"] = "constant"

    def scale(self, step: int, max_steps: int) -> float:
        """Factor on the learning rate of the step with index `step` (the first is 0)."""
        return self._warmup(step)


class Linear(_Warmup):
    """Linear decay to zero after warm-up."""

    type: Literal["linear"] = "linear"

    def scale(self, step: int, max_steps: int) -> float:
        """Factor on the learning rate of the step with index `step` (the first is 0)."""
        return self._warmup(step) * (1 - self._progress(step, max_steps))


class Cosine(_Warmup):
    """Half a cosine down to `final_scale` after warm-up (https://arxiv.org/abs/1608.03983)."""

    type: Literal["cosine"] = "cosine"
    final_scale: float = Field(0.0, ge=0, le=1)
    """Factor on the learning rate at the end."""

    def scale(self, step: int, max_steps: int) -> float:
        """Factor on the learning rate of the step with index `step` (the first is 0)."""
        falling = 0.5 * (1 + math.cos(math.pi * self._progress(step, max_steps)))
        return self._warmup(step) * (self.final_scale + (1 - self.final_scale) * falling)


ScheduleConfig = Annotated[Constant | Linear | Cosine, Field(discriminator="type")]
