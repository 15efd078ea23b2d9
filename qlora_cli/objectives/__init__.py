"""The objectives. To add one: a module in a file here, and a config class in the union below."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from qlora_cli.common.config import Config

if TYPE_CHECKING:
    import torch
    from torch import nn

    from qlora_cli.kernels.cross_entropy import CrossEntropy, LossChunks
    from qlora_cli.objectives.base import Objective


class Supervised(Config):
    """Supervised fine-tuning: the cross-entropy of each supervised token."""

    type: Literal["supervised"] = "supervised"

    def build(
        self,
        model: nn.Module,
        dtype: torch.dtype,
        cross_entropy: CrossEntropy,
        chunks: LossChunks | None = None,
    ) -> Objective:
        """Build the objective.

        Args:
            model: the model that is trained, with its adapter.
            dtype: autocast dtype; float32 means no autocast.
            cross_entropy: kernel for the loss of a chunk of logits, with its gradient.
            chunks: rows of logits to compute at a time; None are those of the model's device.
        """
        from qlora_cli.objectives.supervised import TokenLoss

        return TokenLoss(model, dtype, cross_entropy, chunks)


ObjectiveConfig = Supervised
"""The union of all objectives; with a second one, `Annotated[Supervised | ...,
Field(discriminator="type")]`."""
