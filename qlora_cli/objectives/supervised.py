"""Supervised fine-tuning: token cross-entropy, at the supervised positions only."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from qlora_cli.kernels.cross_entropy import CrossEntropy, LossChunks, cross_entropy
from qlora_cli.objectives.base import Objective
from qlora_cli.objectives.token_losses import TokenLosses
from qlora_cli.types import Batch


class TokenLoss(Objective):
    """Cross-entropy, summed over the supervised tokens of a micro-batch.

    Args:
        model: a causal language model, with or without PEFT around it.
        dtype: autocast dtype; float32 means no autocast.
        cross_entropy: kernel for the losses of a chunk of logits, with their gradient.
        chunks: rows of logits to compute at a time; None are those of the model's device.
    """

    unit: ClassVar[str] = "supervised_tokens"
    has_perplexity: ClassVar[bool] = True

    def __init__(
        self,
        model: nn.Module,
        dtype: torch.dtype,
        cross_entropy: CrossEntropy = cross_entropy,
        chunks: LossChunks | None = None,
    ) -> None:
        super().__init__(model, dtype)
        self.token_losses = TokenLosses(model, dtype, cross_entropy, chunks)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss sum; there are no metrics."""
        return self.token_losses.total(batch), {}

    def weight(self, batch: Batch) -> int:
        """Count the supervised tokens."""
        return batch.num_supervised

    def of_rows(self, batch: Batch) -> Tensor:
        """Return the loss sum of each row, (B,) in float64, without a gradient."""
        return self.of_labels(batch, batch.labels, torch.arange(len(batch.labels)))

    def of_labels(self, batch: Batch, labels: Tensor, rows: Tensor) -> Tensor:
        """Return the loss sum of several label sequences on the same rows, (L,) in float64.

        Args:
            labels: (L, T), on the host.
            rows: (L,), the row of the batch that each label sequence belongs to.
        """
        return self.token_losses.of_labels(batch, labels, rows)
