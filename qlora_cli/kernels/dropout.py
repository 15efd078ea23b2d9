"""Dropout that is kept as a seed instead of a mask, so that the backward pass draws it again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class SeededDropout:
    """Dropout of the input of LoRA's update (Srivastava et al. 2014, section 10)."""

    rate: float
    """Probability that a value is dropped; less than 1."""
    seed: int

    def apply(self, x: Tensor) -> Tensor:
        """Return the values (T, in), some dropped and the others scaled; the same ones each time.

        This is also the gradient of itself.
        """
        generator = _generator(x.device).manual_seed(self.seed)
        kept = torch.empty_like(x, memory_format=torch.contiguous_format)
        kept.bernoulli_(1 - self.rate, generator=generator)
        return kept.mul_(x).mul_(1 / (1 - self.rate))  # rounded only here: 1 / (1 - rate) is not


def draw_dropouts(rates: Sequence[float]) -> list[SeededDropout | None]:
    """Draw a seed for each rate that is not 0, from torch's generator of the CPU.

    A checkpoint has the state of this generator, and reading a number from it never waits for a
    card.
    """
    if not any(rates):
        return [None] * len(rates)
    seeds = torch.randint(2**62, (len(rates),)).tolist()
    return [
        SeededDropout(rate, seed) if rate else None for rate, seed in zip(rates, seeds, strict=True)
    ]


@cache
def _generator(device: torch.device) -> torch.Generator:
    return torch.Generator(device)
