"""What a low-rank update does to its weight, from its two factors and never from their product.

Shapes: A (R, I) and B (O, R); the update is scale * B @ A, (O, I). For O = I = 4096 and R = 16 the
product has 128 times the numbers of the factors. All arithmetic is in float64.
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
    """What an adapter adds to one weight."""

    a: Tensor  # (R, I) float64
    b: Tensor  # (O, R) float64, scaled

    @classmethod
    def of(cls, a: Tensor, b: Tensor, scale: float) -> Update:
        """From the factors as they are saved."""
        return cls(a.double(), b.double() * scale)

    @property
    def rank(self) -> int:
        """Rows of A."""
        return self.a.shape[0]

    def norm(self) -> float:
        """Frobenius norm."""
        return math.sqrt(max(0.0, self.dot(self)))

    def dot(self, other: Update) -> float:
        """Sum of the products of all entries: <B A, B' A'> = <Bt B', A At'>, of R x R' each."""
        return float(((self.b.T @ other.b) * (self.a @ other.a.T)).sum())

    def distance(self, other: Update) -> float:
        """Frobenius norm of the difference.

        As the norm of one update [B, -B'] [A; A'], since the difference of three large products
        would lose what is small.
        """
        return float(weighted_sum([self, other], [1.0, -1.0]).singular_values().norm())

    def singular_values(self) -> Tensor:
        """Of the update, the largest first (R,): those of the R x R core between two QRs."""
        import torch

        core = torch.linalg.qr(self.b).R @ torch.linalg.qr(self.a.T).R.T
        values: Tensor = torch.linalg.svdvals(core)
        return values


def weighted_sum(updates: Sequence[Update], weights: Sequence[float]) -> Update:
    """The weighted sum, as one update whose rank is the sum of theirs."""
    import torch

    return Update(
        torch.cat([update.a for update in updates]),
        torch.cat([u.b * weight for u, weight in zip(updates, weights, strict=True)], dim=1),
    )


def effective_rank(singular_values: Tensor) -> float:
    """exp of the entropy of the singular values' shares (Roy & Vetterli 2007); 0 of nothing.

    R equal ones give R, and one that outweighs all others gives 1.
    """
    total = singular_values.sum()
    if float(total) == 0:
        return 0.0
    shares = singular_values / total
    shares = shares[shares > 0]
    return float((-(shares * shares.log()).sum()).exp())


def read_updates(config: LoraConfig, saved: dict[str, Tensor]) -> dict[str, Update]:
    """Module path -> its update. Tensors that are no factors (modules trained in full) are left
    out.

    Raises:
        ModelError: a factor is alone, or the two do not belong together.
    """
    updates = {}
    for key, tensor in saved.items():
        for first, second in ((_A, _B), (_EMBEDDING_A, _EMBEDDING_B)):
            if key.endswith(first):
                name = key.removesuffix(first).removeprefix("base_model.model.")
                other = saved.get(key.removesuffix(first) + second)
                if other is None or not _are_factors(tensor, other):
                    raise ModelError(f"{key} has no factor beside it of the same rank")
                scale = update_scale(config, name, tensor.shape[0])
                updates[name] = Update.of(tensor.flatten(1), other.flatten(1), scale)
    return updates


def _are_factors(a: Tensor, b: Tensor) -> bool:
    is_filled = min(a.dim(), b.dim()) >= 2 and a.numel() > 0 and b.numel() > 0
    return is_filled and b.flatten(1).shape[1] == a.shape[0]


def update_scale(config: LoraConfig, module: str, rank: int) -> float:
    """alpha / r, or alpha / sqrt(r) for rsLoRA, with the alpha of this module."""
    from peft.utils.other import get_pattern_key

    key = get_pattern_key(config.alpha_pattern.keys(), module)
    alpha = config.alpha_pattern.get(key, config.lora_alpha)
    return float(alpha / (math.sqrt(rank) if config.use_rslora else rank))
