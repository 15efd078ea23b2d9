"""Several optimizers combined into one for the loop, checkpoints and schedules."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.optim import Optimizer


def combine_optimizers(*optimizers: Optimizer) -> Optimizer:
    """Return one optimizer in which each of `optimizers` updates its own groups."""
    import torch

    class Combined(torch.optim.Optimizer):
        """Holds the groups (in the order of their optimizers) and the states of all."""

        def __init__(self) -> None:
            super().__init__([group for one in optimizers for group in one.param_groups], {})

        @torch.no_grad()
        # torch's takes an optional closure and returns its loss; here neither is used.
        def step(self, closure: None = None) -> None:  # type: ignore[override]
            """Update all parameters that have a gradient."""
            start = 0
            for one in optimizers:
                number = len(one.param_groups)
                # Assigned in each step: loading a state replaces these lists and dictionaries.
                one.param_groups = self.param_groups[start : start + number]
                one.state = self.state
                one.step()
                start += number

    return Combined()
