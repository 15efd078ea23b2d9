"""AdaLoRA's rank allocation (Zhang et al. 2023, https://arxiv.org/abs/2303.10512): remove the least
important ranks of updates of the form B diag(values) directions.

A test compares it with PEFT's RankAllocator. All of its state is in buffers of the factors, so
checkpoints contain it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qlora_cli.adapters.layers.lora_init import ScaledFactor
from qlora_cli.types import StepHooks


@dataclass(frozen=True, slots=True)
class RankBudget:
    """The number of ranks in each step, over all updates together."""

    initial: int
    """Ranks at the beginning."""
    final: int
    """Ranks at the end."""
    first_step: int
    """The last step with all ranks."""
    last_step: int
    """The step after which no more ranks are removed."""
    every: int
    """Steps between two allocations."""

    def at(self, step: int) -> int:
        """Return the number of ranks after a step, which falls cubically (equation 12)."""
        left = 1 - (step - self.first_step) / (self.last_step - self.first_step)
        return int((self.initial - self.final) * left**3 + self.final)

    def is_due(self, step: int) -> bool:
        """Tell whether ranks are removed after a step."""
        is_between = self.first_step < step < self.last_step
        return step == self.last_step or (is_between and step % self.every == 0)


class RankAllocator(StepHooks):
    """Removes the least important ranks of all updates. Until `last_step` they can come back.

    Args:
        pairs: A and B of each update.
        beta1: decay of the running mean of importance.
        beta2: decay of the running mean of its deviation.
        orthogonality: weight of the penalty on directions that are not orthogonal.
    """

    def __init__(
        self,
        pairs: Sequence[tuple[ScaledFactor, nn.Linear]],
        budget: RankBudget,
        *,
        beta1: float,
        beta2: float,
        orthogonality: float,
    ) -> None:
        self._pairs = pairs
        self._budget = budget
        self._beta1, self._beta2 = beta1, beta2
        self._orthogonality = orthogonality

    def before_update(self) -> None:
        """Add the gradient of the orthogonality penalty (equation 4).

        The penalty is the mean over all matrices P of the norm of P^T P - I (P P^T - I for A).
        """
        weights = [weight for a, b in self._pairs for weight in (a.directions, b.weight)]
        with torch.enable_grad():
            deviations = [
                product - torch.eye(len(product), dtype=product.dtype, device=product.device)
                for a, b in self._pairs
                for product in (a.directions @ a.directions.T, b.weight.T @ b.weight)
            ]
            penalty = torch.stack([one.norm() for one in deviations]).mean() * self._orthogonality
        for weight, gradient in zip(weights, torch.autograd.grad(penalty, weights), strict=True):
            assert weight.grad is not None
            weight.grad += gradient

    @torch.no_grad()
    def after_update(self, step: int) -> None:
        """Update the importance of all ranks, and remove those beyond the budget."""
        budget = self._budget
        if step < budget.last_step:
            for a, b in self._pairs:
                self._measure(a, "a", a.directions)
                self._measure(a, "values", a.values)
                self._measure(a, "b", b.weight)
        if budget.is_due(step):
            self._remove(budget.initial - budget.at(step))
        if step >= budget.last_step:
            for a, _ in self._pairs:
                a.values.mul_(a.kept)

    def _measure(self, factor: ScaledFactor, name: str, weight: Tensor) -> None:
        """Update the sensitivity of the loss to each number (equations 8 to 10)."""
        assert weight.grad is not None
        found = (weight * weight.grad).abs()
        mean, spread = (factor.get_buffer(f"{kind}_{name}") for kind in ("mean", "spread"))
        mean.mul_(self._beta1).add_(found, alpha=1 - self._beta1)
        spread.mul_(self._beta2).add_((found - mean).abs(), alpha=1 - self._beta2)

    def _remove(self, number: int) -> None:
        """Set the values of the `number` least important ranks to zero (equation 7)."""
        scores = [_scores(a) for a, _ in self._pairs]
        # Kept as a tensor, so that the host does not wait for the device.
        bound = torch.cat(scores).kthvalue(number).values if number else -torch.inf
        for (a, _), score in zip(self._pairs, scores, strict=True):
            a.kept.copy_((score > bound)[:, None])
            a.values.mul_(a.kept)


def _scores(factor: ScaledFactor) -> Tensor:
    """Return the importance of each rank (R,): of its value, plus the means of its directions."""
    values, a, b = (
        factor.get_buffer(f"mean_{name}") * factor.get_buffer(f"spread_{name}")
        for name in ("values", "a", "b")
    )
    return values[:, 0] + a.mean(1) + b.mean(0)
