"""What queries and keys go through between their product and attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qlora_cli.kernels.elementwise import Elementwise


class Heads(Protocol):
    """Queries and keys on their way. E features of a head; H heads of both, queries first."""

    def forward(
        self, qk: Tensor, v: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What attention is given (T, H, E), and what is kept of `qk` and of `v`.

        Args:
            qk: (T, H, E); it and `v` are views of one product.
            cos: (T, E); sin likewise.
        """
        ...

    def again(self, kept: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """What attention was given, from what was kept."""
        ...

    def backward(self, grad: Tensor, kept: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Gradient of `qk`, from that of what attention was given."""
        ...


@dataclass(frozen=True)
class Rotated:
    """They are rotated to their positions (Llama)."""

    ops: Elementwise

    def forward(
        self, qk: Tensor, v: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Kept as rotated."""
        rotated = self.ops.rotate(qk, cos, sin)
        return rotated, rotated, v.contiguous()  # a view would keep the product alive with it

    def again(self, kept: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Nothing to do."""
        return kept

    def backward(self, grad: Tensor, kept: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotated back."""
        return self.ops.rotate(grad, cos, -sin)


@dataclass(frozen=True)
class NormedAndRotated:
    """Each head is normed first (Qwen 3). The gradient asks for what was there before the norm, so
    the product is kept whole, and what attention was given is made of it again."""

    ops: Elementwise
    norms: tuple[Any, Any]
    """Of queries and of keys."""
    numbers: tuple[int, int]
    """Heads of each."""

    def forward(
        self, qk: Tensor, v: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Kept as they are."""
        return self.again(qk, cos, sin), qk, v

    def again(self, kept: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Normed and rotated."""
        return self.ops.norm_rotate(kept, self._weight(), self._eps, cos, sin)

    def backward(self, grad: Tensor, kept: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotated back, and through the norm."""
        return self.ops.norm_rotate_backward(grad, kept, self._weight(), self._eps, cos, sin)

    @property
    def _eps(self) -> float:
        eps: float = self.norms[0].variance_epsilon
        return eps

    def _weight(self) -> Tensor:
        """(H, E): all heads of a kind share one norm."""
        pairs = zip(self.norms, self.numbers, strict=True)
        return torch.cat([norm.weight.expand(number, -1) for norm, number in pairs])


def heads_of(attention: Any, numbers: tuple[int, int], ops: Elementwise) -> Heads:
    """What the heads of a layer go through.

    Args:
        attention: of the layer.
        numbers: heads of queries, and of keys.
    """
    if has_head_norms(attention):
        return NormedAndRotated(ops, (attention.q_norm, attention.k_norm), numbers)
    return Rotated(ops)


def has_head_norms(model: nn.Module) -> bool:
    """Whether there is such a norm in a model, or in a part of it."""
    return any(name.rpartition(".")[2] == "q_norm" for name, _ in model.named_modules())
