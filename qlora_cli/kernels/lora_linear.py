"""Linear layers with a low-rank update, computed so that rounding does not lose the update.

The usual order adds the update to an output that is rounded already, and in bfloat16 most of a
small update is less than half a unit in the last place. Here the update comes first and the base
product is accumulated onto it, with one rounding at the end: y = (x A^T) (s B)^T, then y += x W^T
(`docs/speed.md`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer


def base_weight(linear: nn.Module, dtype: torch.dtype) -> Tensor:
    """The weight of a linear layer (out, in), dequantized if it is held in 4 bit."""
    import bitsandbytes.functional as bnb
    from bitsandbytes.nn import Linear4bit

    if isinstance(linear, Linear4bit):
        weight: Any = linear.weight
        weight = bnb.dequantize_4bit(weight.data, weight.quant_state)
    else:
        weight = linear.weight
    found: Tensor = weight.detach().to(dtype)
    return found


@dataclass(frozen=True)
class Projection:
    """One or several linear layers of one input, side by side: queries, keys and values, say.

    Their products are done at once. Those with an update have a row of A and a column of B each, so
    that B is block diagonal.
    """

    linears: Sequence[nn.Module]
    """PEFT's layers, or plain ones without an update."""

    @property
    def adapted(self) -> list[LoraLayer]:
        """Those with an update."""
        return [linear for linear in self.linears if hasattr(linear, "lora_A")]

    def trained(self) -> list[Tensor]:
        """A (R, in) and B (out, R) of each update, in turn."""
        return [
            half[adapter_of(linear)].weight
            for linear in self.adapted
            for half in (linear.lora_A, linear.lora_B)
        ]

    def weight(self, dtype: torch.dtype) -> Tensor:
        """(out, in) of all of them."""
        weights = [base_weight(base_of(linear), dtype) for linear in self.linears]
        return weights[0] if len(weights) == 1 else torch.cat(weights)

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        """(out,) of all of them, or none if none has one."""
        biases: list[Any] = [base_of(linear).bias for linear in self.linears]
        if all(bias is None for bias in biases):
            return None
        widths = [base_of(linear).out_features for linear in self.linears]
        filled = [
            torch.zeros(width) if bias is None else bias.detach()
            for bias, width in zip(biases, widths, strict=True)
        ]
        return torch.cat([bias.to(dtype) for bias in filled])

    def factors(self, trained: Sequence[Tensor], dtype: torch.dtype) -> Factors:
        """What the updates of a micro-batch are computed with, from what `trained` gives."""
        rows = trained[0::2]
        ranks = [row.shape[0] for row in rows]
        outs = [int(base_of(linear).out_features) for linear in self.linears]
        columns = iter(zip(self.adapted, trained[1::2], ranks, strict=True))
        if not rows:
            return Factors(None, None, [])
        b = rows[0].new_zeros((sum(outs), sum(ranks)), dtype=dtype)
        blocks, top, left = [], 0, 0
        for linear, out in zip(self.linears, outs, strict=True):
            if hasattr(linear, "lora_A"):
                adapted, column, rank = next(columns)
                scale = adapted.scaling[adapter_of(adapted)]
                block = slice(top, top + out), slice(left, left + rank)
                b[block] = (column * scale).to(dtype)
                blocks.append((*block, scale))
                left += rank
            top += out
        return Factors(torch.cat([row.to(dtype) for row in rows]), b, blocks)


@dataclass(frozen=True)
class Factors:
    """The low-rank halves of a projection in the dtype that is computed in."""

    a: Tensor | None
    """(R, in), one update below the other."""
    b: Tensor | None
    """(out, R), block diagonal, scaled."""
    blocks: list[tuple[slice, slice, float]]
    """Where in `b` each update is, and its scale."""

    def forward(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, dropped: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """(T, in) -> (T, out), and the low-rank states (T, R).

        Args:
            dropped: what the update sees in place of `x`.
        """
        if self.a is None or self.b is None:
            return nn.functional.linear(x, weight, bias), None
        low = (x if dropped is None else dropped) @ self.a.T
        y = low @ self.b.T
        if bias is not None:
            y += bias
        return y.addmm_(x, weight.T), low

    def low(self, x: Tensor) -> Tensor | None:
        """The low-rank states (T, R) alone."""
        return None if self.a is None else x @ self.a.T

    def backward_low(self, grad: Tensor) -> Tensor | None:
        """Gradient of the low-rank states (T, R), from that of the output (T, out)."""
        return None if self.b is None else grad @ self.b

    def backward_input(self, grad: Tensor, grad_low: Tensor | None, weight: Tensor) -> Tensor:
        """Gradient of the input (T, in)."""
        if self.a is None or grad_low is None:
            return grad @ weight
        return (grad_low @ self.a).addmm_(grad, weight)

    def backward_update(
        self, grad: Tensor, grad_low: Tensor | None, x: Tensor, low: Tensor | None
    ) -> list[Tensor]:
        """Gradients of each A and B in turn, in float32."""
        if grad_low is None or low is None:
            return []
        grad_a = grad_low.T @ x
        grads = []
        for outs, ranks, scale in self.blocks:
            grads.append(grad_a[ranks].float())
            grads.append((grad[:, outs].T @ low[:, ranks]).float().mul_(scale))
        return grads


def base_of(linear: nn.Module) -> Any:
    """The layer that an update is beside, or the layer itself."""
    return linear.base_layer if hasattr(linear, "lora_A") else linear


def adapter_of(linear: Any) -> str:
    """Name of the one adapter that is active."""
    (name,) = linear.active_adapters
    return str(name)
