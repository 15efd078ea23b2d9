"""Several optimizers that are one to the loop, to checkpoints and to schedules."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.optim import Optimizer


def join(*optimizers: Optimizer) -> Optimizer:
    """One optimizer, in which each of `optimizers` updates its own groups."""
    import torch

    class Joined(torch.optim.Optimizer):
        """It holds groups and states of all, the groups in the order of their optimizers."""

        def __init__(self) -> None:
            super().__init__([group for one in optimizers for group in one.param_groups], {})

        @torch.no_grad()
        # torch's may be given a closure and give back a loss; nobody here asks for either.
        def step(self, closure: None = None) -> None:  # type: ignore[override]
            """Update all parameters that have a gradient."""
            at = 0
            for one in optimizers:
                number = len(one.param_groups)
                # Handed over anew: loading a state replaces an optimizer's lists and dictionaries.
                one.param_groups = self.param_groups[at : at + number]
                one.state = self.state
                one.step()
                at += number

    return Joined()
