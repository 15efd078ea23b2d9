"""Which ranks of low-rank updates are worth keeping: AdaLoRA (Zhang et al. 2023,
https://arxiv.org/abs/2303.10512), on factors of the form B diag(values) directions.

What it computes is what PEFT's RankAllocator does; a test holds them together. All of its state is
in buffers of the factors, so a checkpoint has it.
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
    """How many ranks there are in each step."""

    first: int
    """Of all updates together, at the beginning."""
    last: int
    begin: int
    """The last step with all of them."""
    end: int
    """The step after which nothing is taken away any more."""
    every: int

    def at(self, step: int) -> int:
        """How many are left after a step: falling by a cubic curve (equation 12)."""
        left = 1 - (step - self.begin) / (self.end - self.begin)
        return int((self.first - self.last) * left**3 + self.last)

    def is_due(self, step: int) -> bool:
        """Whether some are taken away after a step."""
        return step == self.end or (self.begin < step < self.end and step % self.every == 0)


class RankAllocator(StepHooks):
    """Takes the least important ranks of all updates away, those that may come back first.

    Args:
        pairs: A and B of each update.
        beta1, beta2: decay of the running mean of importance, and of its spread.
        orthogonality: weight of the penalty of directions that are not orthogonal.
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
        """Add the gradient of the penalty (equation 4), the mean over all matrices of the distance
        of their products with themselves from the identity."""
        weights = [weight for a, b in self._pairs for weight in (a.directions, b.weight)]
        with torch.enable_grad():
            wholes = [
                product - torch.eye(len(product), dtype=product.dtype, device=product.device)
                for a, b in self._pairs
                for product in (a.directions @ a.directions.T, b.weight.T @ b.weight)
            ]
            penalty = torch.stack([whole.norm() for whole in wholes]).mean() * self._orthogonality
        for weight, gradient in zip(weights, torch.autograd.grad(penalty, weights), strict=True):
            assert weight.grad is not None
            weight.grad += gradient

    @torch.no_grad()
    def after_update(self, step: int) -> None:
        """Measure importance, and take away what is beyond the budget."""
        budget = self._budget
        if step < budget.end:
            for a, b in self._pairs:
                self._measure(a, "a", a.directions)
                self._measure(a, "values", a.values)
                self._measure(a, "b", b.weight)
        if budget.is_due(step):
            self._take_away(budget.first - budget.at(step))
        if step >= budget.end:
            for a, _ in self._pairs:
                a.values.mul_(a.kept)

    def _measure(self, factor: ScaledFactor, name: str, weight: Tensor) -> None:
        """The sensitivity of the loss to each number (equations 8 to 10)."""
        assert weight.grad is not None
        found = (weight * weight.grad).abs()
        mean, spread = (factor.get_buffer(f"{kind}_{name}") for kind in ("mean", "spread"))
        mean.mul_(self._beta1).add_(found, alpha=1 - self._beta1)
        spread.mul_(self._beta2).add_((found - mean).abs(), alpha=1 - self._beta2)

    def _take_away(self, number: int) -> None:
        """Set the values of so many ranks to zero: those that matter least (equation 7)."""
        scores = [_scores(a) for a, _ in self._pairs]
        # As a tensor: the host need not wait for it.
        bound = torch.cat(scores).kthvalue(number).values if number else -torch.inf
        for (a, _), score in zip(self._pairs, scores, strict=True):
            a.kept.copy_((score > bound)[:, None])
            a.values.mul_(a.kept)


def _scores(factor: ScaledFactor) -> Tensor:
    """(R,), of its value and of the mean of each direction."""
    values, a, b = (
        factor.get_buffer(f"mean_{name}") * factor.get_buffer(f"spread_{name}")
        for name in ("values", "a", "b")
    )
    return values[:, 0] + a.mean(1) + b.mean(0)
