"""Norms, products and singular values of low-rank updates, without computing the update itself.

Shapes: A (R, I) and B (O, R); the update is scale * B @ A, (O, I). For O = I = 4096 and R = 16 the
update has 128 times as many values as the factors. All arithmetic is in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qlora_cli.errors import ModelError

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import Tensor

_A, _B = ".lora_A.weight", ".lora_B.weight"
_EMBEDDING_A, _EMBEDDING_B = ".lora_embedding_A", ".lora_embedding_B"


@dataclass(frozen=True, slots=True)
class Update:
    """The update that an adapter adds to one weight."""

    a: Tensor  # (R, I) float64
    b: Tensor  # (O, R) float64, scaled

    @classmethod
    def of(cls, a: Tensor, b: Tensor, scale: float) -> Update:
        """Make an update from the saved factors."""
        return cls(a.double(), b.double() * scale)

    @property
    def rank(self) -> int:
        """The number of rows of A."""
        return self.a.shape[0]

    def norm(self) -> float:
        """Return the Frobenius norm."""
        return math.sqrt(max(0.0, self.dot(self)))

    def dot(self, other: Update) -> float:
        """Return the sum of the products of all entries: <B A, B' A'> = <B^T B', A A'^T>."""
        return float(((self.b.T @ other.b) * (self.a @ other.a.T)).sum())

    def distance(self, other: Update) -> float:
        """Return the Frobenius norm of the difference.

        It is the norm of the update [B, -B'] [A; A']: computed from three large products, a small
        difference would be lost to cancellation.
        """
        return float(weighted_sum([self, other], [1.0, -1.0]).singular_values().norm())

    def singular_values(self) -> Tensor:
        """Return the singular values (R,), largest first: those of the R x R core of two QRs."""
        import torch

        core = torch.linalg.qr(self.b).R @ torch.linalg.qr(self.a.T).R.T
        values: Tensor = torch.linalg.svdvals(core)
        return values


def weighted_sum(updates: Sequence[Update], weights: Sequence[float]) -> Update:
    """Return the weighted sum as one update whose rank is the sum of theirs."""
    import torch

    return Update(
        torch.cat([update.a for update in updates]),
        torch.cat([u.b * weight for u, weight in zip(updates, weights, strict=True)], dim=1),
    )


def effective_rank(singular_values: Tensor) -> float:
    """Return exp of the entropy of the singular values' shares (Roy & Vetterli 2007).

    R equal values give R; one that outweighs all others gives 1; zeros give 0.
    """
    total = singular_values.sum()
    if float(total) == 0:
        return 0.0
    shares = singular_values / total
    shares = shares[shares > 0]
    return float((-(shares * shares.log()).sum()).exp())


def read_updates(config: LoraConfig, saved: dict[str, Tensor]) -> dict[str, Update]:
    """Return the update of each module, by its path. Modules trained in full are left out.

    Raises:
        ModelError: a factor lacks its counterpart, or their shapes do not match.
    """
    updates = {}
    for key, tensor in saved.items():
        for first, second in ((_A, _B), (_EMBEDDING_A, _EMBEDDING_B)):
            if key.endswith(first):
                name = key.removesuffix(first).removeprefix("base_model.model.")
                other = saved.get(key.removesuffix(first) + second)
                if other is None or not _are_factors(tensor, other):
                    raise ModelError(f"{key}: the other factor is missing or has another rank")
                scale = update_scale(config, name, tensor.shape[0])
                updates[name] = Update.of(tensor.flatten(1), other.flatten(1), scale)
    return updates


def _are_factors(a: Tensor, b: Tensor) -> bool:
    is_filled = min(a.dim(), b.dim()) >= 2 and a.numel() > 0 and b.numel() > 0
    return is_filled and b.flatten(1).shape[1] == a.shape[0]


def update_scale(config: LoraConfig, module: str, rank: int) -> float:
    """Return alpha / r (rsLoRA: alpha / sqrt(r)) with the alpha of this module."""
    from peft.utils.other import get_pattern_key

    key = get_pattern_key(config.alpha_pattern.keys(), module)
    alpha = config.alpha_pattern.get(key, config.lora_alpha)
    return float(alpha / (math.sqrt(rank) if config.use_rslora else rank))
