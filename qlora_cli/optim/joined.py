"""Several optimizers that are one to the loop, to checkpoints and to schedules."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.optim import Optimizer


class Joined(Optimizer):
    """Each of `optimizers` updates its own groups; groups and states are held here."""

    def __init__(self, *optimizers: Optimizer) -> None:
        groups = [group for one in optimizers for group in one.param_groups]
        super().__init__(groups, {})
        self._optimizers = optimizers

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        assert closure is None
        at = 0
        for one in self._optimizers:
            number = len(one.param_groups)
            # Handed over anew: loading a state replaces the lists and dictionaries of an optimizer.
            one.param_groups = self.param_groups[at : at + number]
            one.state = self.state
            one.step()
            at += number
