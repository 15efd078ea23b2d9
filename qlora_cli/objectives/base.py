"""The contract of an objective: what training minimizes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import Tensor, nn

from qlora_cli.common.eval_mode import eval_mode
from qlora_cli.types import Batch


class Objective(nn.Module, ABC):
    """A loss that is summed over a micro-batch.

    A step adds up the sums of its micro-batches, on all ranks, and divides once by the sum of their
    weights: the result does not depend on how the batch was cut.

    Args:
        model: the model that is trained, with its adapter.
        dtype: autocast dtype; float32 means no autocast.
    """

    unit: ClassVar[str]
    """Name of the things that `weight` counts; the count of a step is logged under it."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model
        self.dtype = dtype

    @abstractmethod
    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss sum of a micro-batch, and sums of metrics by name.

        Loss and metrics are float32 scalars on the device of the batch. The loss carries a
        gradient; the metrics do not, and are logged divided by the weight, as the loss is. Every
        micro-batch has the same metrics, even one whose weight is 0: ranks add them up in order.
        """

    @abstractmethod
    def weight(self, batch: Batch) -> int:
        """Count the tokens, rows or pairs that the loss of a step is divided by, on the host."""

    @abstractmethod
    def of_rows(self, batch: Batch) -> Tensor:
        """Return the share of each row in the loss sum, (B,) in float64, without a gradient."""


@torch.no_grad()
def evaluate_loss(objective: Objective, batches: Iterable[Batch], device: torch.device) -> Tensor:
    """Return loss sum and weight over all batches: (2,) float64, on `device`."""
    totals = torch.zeros(2, dtype=torch.float64, device=device)
    with eval_mode(objective):
        for batch in batches:
            totals[0] += objective.of_rows(batch.to(device)).sum()
            totals[1] += objective.weight(batch)
    return totals
