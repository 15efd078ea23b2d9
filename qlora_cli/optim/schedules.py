"""Learning-rate schedules: pure functions of the step, without a state to save or resume."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from qlora_cli.common.config import Config


class _Warmup(Config):
    decays: ClassVar[bool] = True
    """The learning rate falls after warm-up."""
    warmup_steps: int = Field(0, ge=0)
    """Steps over which the learning rate grows linearly to its peak."""

    def _warmup(self, step: int) -> float:
        # Starts above zero: a first step with a learning rate of zero would be wasted.
        return min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0

    def _progress(self, step: int, max_steps: int) -> float:
        """Return the progress after warm-up: 0 at its end, just under 1 at the last step."""
        return max(0, step - self.warmup_steps) / max(1, max_steps - self.warmup_steps)


class Constant(_Warmup):
    """Constant at the peak learning rate after warm-up."""

    type: Literal["constant"] = "constant"
    decays: ClassVar[bool] = False

    def scale(self, step: int, max_steps: int) -> float:
        """Return the factor on the learning rate of step `step` (the first is 0)."""
        return self._warmup(step)


class Linear(_Warmup):
    """Linear decay to zero after warm-up."""

    type: Literal["linear"] = "linear"

    def scale(self, step: int, max_steps: int) -> float:
        """Return the factor on the learning rate of step `step` (the first is 0)."""
        return self._warmup(step) * (1 - self._progress(step, max_steps))


class Cosine(_Warmup):
    """Cosine decay to `final_scale` after warm-up (https://arxiv.org/abs/1608.03983)."""

    type: Literal["cosine"] = "cosine"
    final_scale: float = Field(0.0, ge=0, le=1)
    """Factor on the learning rate at the end."""

    def scale(self, step: int, max_steps: int) -> float:
        """Return the factor on the learning rate of step `step` (the first is 0)."""
        falling = 0.5 * (1 + math.cos(math.pi * self._progress(step, max_steps)))
        return self._warmup(step) * (self.final_scale + (1 - self.final_scale) * falling)


class WarmupStableDecay(_Warmup):
    """Constant after warm-up, then decay to `final_scale` in the last steps
    (https://arxiv.org/abs/2404.06395)."""

    type: Literal["warmup_stable_decay"] = "warmup_stable_decay"
    decay_share: float = Field(0.2, gt=0, le=1)
    """Share of all steps in which the rate decays, never before warm-up ends."""
    decay: Literal["linear", "cosine", "1-sqrt"] = "linear"
    """The shape of the decay."""
    final_scale: float = Field(0.0, ge=0, le=1)
    """Factor on the learning rate at the end."""

    def scale(self, step: int, max_steps: int) -> float:
        """Return the factor on the learning rate of step `step` (the first is 0)."""
        decay_steps = max(1, round(self.decay_share * max_steps))
        start = max(self.warmup_steps, max_steps - decay_steps)
        progress = max(0, step - start) / max(1, max_steps - start)
        left = {
            "linear": 1 - progress,
            "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
            "1-sqrt": 1 - math.sqrt(progress),
        }[self.decay]
        return self._warmup(step) * (self.final_scale + (1 - self.final_scale) * left)


class Polynomial(_Warmup):
    """Decay to `final_scale` after warm-up, by a power of the share of steps that remain."""

    type: Literal["polynomial"] = "polynomial"
    power: float = Field(2.0, gt=0)
    """Exponent of the share of steps that remain; 1 is linear."""
    final_scale: float = Field(0.0, ge=0, le=1)
    """Factor on the learning rate at the end."""

    def scale(self, step: int, max_steps: int) -> float:
        """Return the factor on the learning rate of step `step` (the first is 0)."""
        left = math.pow(1 - self._progress(step, max_steps), self.power)
        return self._warmup(step) * (self.final_scale + (1 - self.final_scale) * left)


class InverseRoot(_Warmup):
    """Decay as one over the square root of the step after warm-up (https://arxiv.org/abs/1706.03762)."""

    type: Literal["inverse_root"] = "inverse_root"
    timescale: int | None = Field(None, ge=1)
    """The learning rate is halved after three times this many steps, counted from warm-up. Null
    takes `warmup_steps`, or 10,000 without warm-up."""

    def scale(self, step: int, max_steps: int) -> float:
        """Return the factor on the learning rate of step `step` (the first is 0)."""
        timescale = self.timescale or self.warmup_steps or 10_000
        since = max(0, step - self.warmup_steps)
        return self._warmup(step) / math.sqrt(1 + since / timescale)


ScheduleConfig = Annotated[
    Constant | Linear | Cosine | WarmupStableDecay | Polynomial | InverseRoot,
    Field(discriminator="type"),
]
