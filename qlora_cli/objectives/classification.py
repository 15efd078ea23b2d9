"""Objectives of a head that scores rows: labels, numbers, and pairs of a reward model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from qlora_cli.objectives.base import Objective
from qlora_cli.objectives.head_outputs import HeadOutputs
from qlora_cli.types import Batch, copy_to


@dataclass(frozen=True, slots=True)
class HeadTerms:
    """Terms of an objective for L rows, or pairs of rows; each tensor is (L,)."""

    losses: Tensor
    metrics: dict[str, Tensor]


TermsOf = Callable[[Tensor, Tensor], HeadTerms]
"""Computes the terms of outputs (S, K) and of what the rows say (L, n), both float32. Without rows
the second has any shape."""


class HeadLoss(Objective):
    """A loss of the outputs of a head, summed over rows.

    The head runs at the last token of each row only, in float32. No logits of tokens are computed.

    Args:
        model: a sequence classifier, with or without PEFT around it.
        dtype: autocast dtype of the decoder; float32 means no autocast.
        terms: the losses and the metrics.
    """

    unit: ClassVar[str] = "rows"
    link_size: ClassVar[int] = 1
    """Examples that one loss belongs to."""

    def __init__(self, model: nn.Module, dtype: torch.dtype, terms: TermsOf) -> None:
        super().__init__(model, dtype)
        self._outputs = HeadOutputs(model, dtype)
        self._terms_of = terms

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss sum, and sums of the metrics."""
        terms = self._terms(batch)
        return terms.losses.sum(), {name: one.sum() for name, one in terms.metrics.items()}

    def weight(self, batch: Batch) -> int:
        """Count the rows or pairs."""
        return len(batch.values)

    @torch.no_grad()
    def of_rows(self, batch: Batch) -> Tensor:
        """Return the loss of each row, or of each pair at its chosen row, (B,) in float64."""
        losses = self._terms(batch).losses.double()
        if batch.documents:
            return losses.sum()[None]
        shares = losses.new_zeros(len(batch.input_ids))
        shares[: self.link_size * len(losses) : self.link_size] = losses
        return shares

    @torch.no_grad()
    def measured(self, batch: Batch) -> dict[str, Tensor]:
        """Return the sums of loss and metrics."""
        terms = self._terms(batch)
        columns = {"loss": terms.losses, **terms.metrics}
        return {name: one.double().sum() for name, one in columns.items()}

    def _terms(self, batch: Batch) -> HeadTerms:
        """Compute the terms of a batch; those of a dummy batch are none.

        A rank without rows takes part in the backward pass with an empty sum.
        """
        outputs = self._outputs(batch)[: self.link_size * len(batch.values)]
        values = torch.tensor(batch.values, dtype=torch.float32)
        terms = self._terms_of(outputs, copy_to(outputs.device, values))
        metrics = {name: value.detach() for name, value in terms.metrics.items()}
        return HeadTerms(terms.losses, metrics)


class HeadPairLoss(HeadLoss):
    """A loss of the outputs of a head, summed over pairs of rows: a reward model."""

    unit: ClassVar[str] = "pairs"
    link_size: ClassVar[int] = 2
