"""The objectives. To add one: a module in a file here, and a config class in the union below."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from qlora_cli.common.config import Config

if TYPE_CHECKING:
    import torch
    from torch import nn

    from qlora_cli.kernels.cross_entropy import CrossEntropy
    from qlora_cli.objectives.base import Objective


class Supervised(Config):
    """Supervised fine-tuning: the cross-entropy of each supervised token."""

    type: Literal["supervised"] = "supervised"

    def build(self, model: nn.Module, dtype: torch.dtype, cross_entropy: CrossEntropy) -> Objective:
        """Build the objective.

        Args:
            model: the model that is trained, with its adapter.
            dtype: autocast dtype; float32 means no autocast.
            cross_entropy: kernel for the loss of a chunk of logits, with its gradient.
        """
        from qlora_cli.objectives.supervised import TokenLoss

        return TokenLoss(model, dtype, cross_entropy)


ObjectiveConfig = Supervised
"""The union of all objectives; with a second one, `Annotated[Supervised | ...,
Field(discriminator="type")]`."""
