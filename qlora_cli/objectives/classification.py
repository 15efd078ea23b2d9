"""Objectives of a head that scores rows: labels, numbers, and pairs of a reward model."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora_cli.objectives.base import Objective
from qlora_cli.objectives.head_outputs import HeadOutputs
from qlora_cli.types import Batch, Problem, copy_to


class HeadLoss(Objective):
    """A loss of the outputs of a head, summed over links: rows, or pairs of rows.

    The head runs at the last token of each row only, in float32. No logits of tokens are computed.
    """

    rows_per_link: ClassVar[int]
    """Examples that one loss belongs to."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__(model, dtype)
        self._outputs = HeadOutputs(model, dtype)

    @abstractmethod
    def of_links(self, outputs: Tensor, values: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the losses (L,), and the values (L,) of the metrics.

        Args:
            outputs: (S, K) float32, those of the examples.
            values: (L, n), what the rows say; of any shape if L is 0.
        """

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss sum, and sums of the metrics."""
        losses, metrics = self._losses(batch)
        return losses.sum(), {name: value.float().sum() for name, value in metrics.items()}

    def weight(self, batch: Batch) -> int:
        """Count the rows or pairs."""
        return len(batch.values)

    @torch.no_grad()
    def of_rows(self, batch: Batch) -> Tensor:
        """Return the loss of each row, or of each pair at its chosen row, (B,) in float64."""
        losses = self._losses(batch)[0].double()
        if batch.documents:
            return losses.sum()[None]
        shares = losses.new_zeros(len(batch.input_ids))
        shares[: self.rows_per_link * len(losses) : self.rows_per_link] = losses
        return shares

    @torch.no_grad()
    def measured(self, batch: Batch) -> dict[str, Tensor]:
        """Return the sums of loss and metrics."""
        losses, metrics = self._losses(batch)
        return {name: one.double().sum() for name, one in {"loss": losses, **metrics}.items()}

    def _losses(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the losses of a batch; those of a dummy batch are none.

        A rank without rows takes part in the backward pass with an empty sum.
        """
        number = len(batch.values)
        outputs = self._outputs(batch)[: self.rows_per_link * number]
        values = torch.tensor(batch.values, dtype=torch.float32)
        losses, metrics = self.of_links(outputs, copy_to(outputs.device, values))
        return losses, {name: value.detach() for name, value in metrics.items()}


class ClassificationLoss(HeadLoss):
    """The loss of the labels or numbers of rows.

    Args:
        model: a sequence classifier, with or without PEFT around it.
        dtype: autocast dtype; float32 means no autocast.
        class_weights: (K,), factors on the losses of the labels; None for 1.
    """

    unit: ClassVar[str] = "rows"
    rows_per_link: ClassVar[int] = 1

    def __init__(
        self,
        model: nn.Module,
        dtype: torch.dtype,
        problem: Problem,
        class_weights: Tensor | None = None,
    ) -> None:
        super().__init__(model, dtype)
        self._problem = problem
        device = next(model.parameters()).device
        self._class_weights = None if class_weights is None else class_weights.to(device)

    def of_links(self, outputs: Tensor, values: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        weights = self._class_weights
        if self._problem == "regression":
            errors = outputs - values.reshape(outputs.shape)
            return errors.square().mean(1), {"mae": errors.abs().mean(1)}
        if self._problem == "multi":
            values = values.reshape(outputs.shape)
            losses = F.binary_cross_entropy_with_logits(
                outputs, values, weight=weights, reduction="none"
            )
            is_right = ((outputs > 0) == (values > 0)).all(1)
            return losses.mean(1), {"accuracy": is_right.float()}
        labels = values.reshape(-1).long()
        losses = F.cross_entropy(outputs, labels, weight=weights, reduction="none")
        return losses, {"accuracy": (outputs.argmax(1) == labels).float()}


class RewardLoss(HeadLoss):
    """The loss of pairs under a reward model.

    Args:
        model: a sequence classifier with one output, with or without PEFT around it.
        dtype: autocast dtype; float32 means no autocast.
        center_rewards: weight of the squared sum of both rewards.
    """

    unit: ClassVar[str] = "pairs"
    rows_per_link: ClassVar[int] = 2

    def __init__(self, model: nn.Module, dtype: torch.dtype, center_rewards: float = 0.0) -> None:
        super().__init__(model, dtype)
        self._center_rewards = center_rewards

    def of_links(self, outputs: Tensor, values: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        chosen, rejected = outputs[0::2, 0], outputs[1::2, 0]
        margins = chosen - rejected
        losses = -F.logsigmoid(margins - values.reshape(margins.shape))
        if self._center_rewards:
            losses = losses + self._center_rewards * (chosen + rejected).square()
        return losses, {"accuracy": (margins.sign() + 1) / 2, "margin": margins}
