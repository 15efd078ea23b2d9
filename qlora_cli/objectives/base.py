"""The contract of an objective: what training minimizes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from qlora_cli.common.eval_mode import eval_mode
from qlora_cli.types import Batch

SumOverRanks = Callable[[Tensor], Tensor]
"""Adds up a tensor over all processes of the run."""


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
    has_perplexity: ClassVar[bool] = False
    """The exponential of the mean loss is the perplexity."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model
        self.dtype = dtype

    def kept_tensors(self) -> list[Tensor]:
        """Return the tensors that it keeps for the whole run: copies of weights; here, none."""
        return []

    def prepare(
        self, batches: Sequence[Batch], device: torch.device, sum_over_ranks: SumOverRanks
    ) -> list[Batch]:
        """Compute, without a gradient, what the losses of a whole step need before its first one.

        Args:
            batches: all micro-batches of this rank in a step, or all batches of an evaluation.

        Returns:
            The batches that `forward` is given: here, the same.
        """
        return list(batches)

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
        """Return the share of each row in the loss sum, (B,) in float64, without a gradient.

        For linked examples the share of a link is that of its first example, and the others have
        none.
        """

    def measured(self, batch: Batch) -> dict[str, Tensor]:
        """Return the loss sum of an evaluation batch as `loss`, and sums of metrics by name.

        They are scalars in float64, without a gradient.
        """
        return {"loss": self.of_rows(batch).sum()}


def same(values: Tensor) -> Tensor:
    """Add up over one process: return the values."""
    return values


@torch.no_grad()
def evaluate_objective(
    objective: Objective,
    batches: Iterable[Batch],
    device: torch.device,
    sum_over_ranks: SumOverRanks = same,
) -> dict[str, float]:
    """Return the mean loss and the mean metrics over all batches, by name; the loss comes first.

    Args:
        sum_over_ranks: adds up over processes; each has the same number of batches.
    """
    totals: dict[str, Tensor] = {}
    weight = 0
    with eval_mode(objective):
        for batch in objective.prepare(list(batches), device, sum_over_ranks):
            for name, value in objective.measured(batch.to(device)).items():
                totals[name] = totals.get(name, 0.0) + value
            weight += objective.weight(batch)
    sums = torch.stack([*totals.values(), torch.tensor(float(weight), device=device)]).double()
    *found, number = sum_over_ranks(sums).tolist()
    return {name: value / number for name, value in zip(totals, found, strict=True)}
