"""Transforms of queries and keys between their matmul and attention: norms and rotary positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qlora_cli.kernels.elementwise import Elementwise


class HeadTransform(Protocol):
    """Transform of queries and keys. H counts the heads of both here, queries first; E per head."""

    def forward(
        self, qk: Tensor, v: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the input of attention (T, H, E), and what to save of `qk` and of `v`.

        Args:
            qk: (T, H, E); `qk` and `v` are views of one matmul's output.
            cos: (T, E), the same shape as `sin`.
        """
        ...

    def recompute(self, kept: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Recompute the input of attention from what was saved."""
        ...

    def backward(self, grad: Tensor, kept: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Compute the gradient of `qk` from that of the input of attention."""
        ...


@dataclass(frozen=True)
class RotaryHeads:
    """Rotary positions only (Llama)."""

    ops: Elementwise

    def forward(
        self, qk: Tensor, v: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rotate, and save the rotated heads."""
        rotated = self.ops.rotate(qk, cos, sin)
        return rotated, rotated, v.contiguous()  # a view would keep the whole matmul output alive

    def recompute(self, kept: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Return what was saved: it is rotated already."""
        return kept

    def backward(self, grad: Tensor, kept: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate back."""
        return self.ops.rotate(grad, cos, -sin)


@dataclass(frozen=True)
class NormedRotaryHeads:
    """RMS norm of each head, then rotary positions (Qwen 3).

    The gradient of the norm needs its input, so the matmul output is saved whole and the input of
    attention is recomputed from it.
    """

    ops: Elementwise
    norms: tuple[Any, Any]
    """Norms of queries and of keys."""
    num_heads: tuple[int, int]
    """Heads of queries and of keys."""

    def forward(
        self, qk: Tensor, v: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Norm and rotate, and save the input."""
        return self.recompute(qk, cos, sin), qk, v

    def recompute(self, kept: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Norm and rotate what was saved."""
        return self.ops.norm_rotate(kept, self._weight(), self._eps, cos, sin)

    def backward(self, grad: Tensor, kept: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate back, then go back through the norm."""
        return self.ops.norm_rotate_backward(grad, kept, self._weight(), self._eps, cos, sin)

    @property
    def _eps(self) -> float:
        eps: float = self.norms[0].variance_epsilon
        return eps

    def _weight(self) -> Tensor:
        """Return the norm weights (H, E): all query heads share one norm, all key heads another."""
        pairs = zip(self.norms, self.num_heads, strict=True)
        return torch.cat([norm.weight.expand(number, -1) for norm, number in pairs])


def choose_head_transform(
    attention: Any, num_heads: tuple[int, int], ops: Elementwise
) -> HeadTransform:
    """Choose the transform that the heads of a layer need.

    Args:
        attention: the layer's attention module.
        num_heads: heads of queries and of keys.
    """
    if has_head_norms(attention):
        return NormedRotaryHeads(ops, (attention.q_norm, attention.k_norm), num_heads)
    return RotaryHeads(ops)


def has_head_norms(model: nn.Module) -> bool:
    """Return whether a model, or a part of one, normalises its heads."""
    return any(name.rpartition(".")[2] == "q_norm" for name, _ in model.named_modules())
