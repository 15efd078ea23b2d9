"""What every method says of itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from qlora_cli.common.config import Config
from qlora_cli.types import StepHooks

if TYPE_CHECKING:
    from torch import nn


class AdapterMethod(Config):
    """A way to train. A variant writes `attach`, `save`, `load` and `edits`."""

    trains_base: ClassVar[bool] = False
    """Weights of the base are trained: they are saved, and not an addition to them."""
    trains_all: ClassVar[bool] = False
    no_merge: ClassVar[str] = ""
    """Why it cannot be merged; empty if it can."""
    no_averaging: ClassVar[str] = ""
    """Why an optimizer that averages the weights cannot train it; empty if one can."""
    no_packing: ClassVar[str] = ""
    """Why examples cannot lie end to end in one row; empty if they can."""
    no_quantization: ClassVar[Mapping[str, str]] = {}
    """Quantizations that it does not work with -> why."""
    first_change: ClassVar[str] = ""
    """How the model differs from its base before the first step; empty if it does not."""
    type: str

    @property
    def saved_per_trained(self) -> int:
        """Numbers in what is saved, for each trained one; about."""
        return 1

    def step_hooks(self, model: nn.Module, max_steps: int) -> StepHooks:
        """What the method does in each step beside the optimizer; most do nothing.

        Args:
            model: as `attach` returned it.
            max_steps: optimizer steps of the run.
        """
        return StepHooks()
