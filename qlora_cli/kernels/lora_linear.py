"""Linear layers with LoRA, computed in the order that keeps small updates from being rounded away.

The usual order adds the update to an output that is rounded already. In bfloat16, most of a small
update is below half a unit in the last place and is lost. Here the update is computed first and the
base matmul is accumulated onto it, with one rounding at the end: y = (x A^T) (s B)^T, then
y += x W^T (`docs/speed.md`).
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
    """Return the weight of a linear layer (out, in), dequantized from 4 bit if necessary."""
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
    """One or several linear layers with the same input, such as queries, keys and values.

    They are computed as one matmul. The A of their updates are stacked, and their B form a
    block-diagonal matrix.
    """

    linears: Sequence[nn.Module]
    """PEFT's layers, or plain ones without an update."""

    @property
    def adapted(self) -> list[LoraLayer]:
        """Return the layers with a LoRA update."""
        return [linear for linear in self.linears if hasattr(linear, "lora_A")]

    def trained(self) -> list[Tensor]:
        """Return A (R, in) and B (out, R) of each update, alternating."""
        return [
            half[active_adapter_of(linear)].weight
            for linear in self.adapted
            for half in (linear.lora_A, linear.lora_B)
        ]

    def weight(self, dtype: torch.dtype) -> Tensor:
        """Return the stacked weights (out, in)."""
        layers = [base_layer_of(linear) for linear in self.linears]
        if len(layers) == 1:
            return base_weight(layers[0], dtype)
        outs = [layer.out_features for layer in layers]
        shape = sum(outs), layers[0].in_features
        stacked: Tensor = layers[0].weight.detach().new_empty(shape, dtype=dtype)
        # One after the other, so that only one weight is alive outside the stack.
        for rows, layer in zip(stacked.split(outs), layers, strict=True):
            rows.copy_(base_weight(layer, dtype))
        return stacked

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        """Return the stacked biases (out,), or None if no layer has one."""
        biases: list[Any] = [base_layer_of(linear).bias for linear in self.linears]
        if all(bias is None for bias in biases):
            return None
        widths = [base_layer_of(linear).out_features for linear in self.linears]
        one = next(bias for bias in biases if bias is not None)
        filled = [
            one.new_zeros(width) if bias is None else bias.detach()
            for bias, width in zip(biases, widths, strict=True)
        ]
        return torch.cat([bias.to(dtype) for bias in filled])

    def factors(self, trained: Sequence[Tensor], dtype: torch.dtype) -> LoraFactors:
        """Make the LoRA factors of a micro-batch from the weights that `trained` returns."""
        rows = trained[0::2]
        ranks = [row.shape[0] for row in rows]
        outs = [int(base_layer_of(linear).out_features) for linear in self.linears]
        columns = iter(zip(self.adapted, trained[1::2], ranks, strict=True))
        if not rows:
            return LoraFactors(None, None, [])
        b = rows[0].new_zeros((sum(outs), sum(ranks)), dtype=dtype)
        blocks, top, left = [], 0, 0
        for linear, out in zip(self.linears, outs, strict=True):
            if hasattr(linear, "lora_A"):
                adapted, column, rank = next(columns)
                scale = adapted.scaling[active_adapter_of(adapted)]
                block = slice(top, top + out), slice(left, left + rank)
                b[block] = (column * scale).to(dtype)
                blocks.append((*block, scale))
                left += rank
            top += out
        return LoraFactors(torch.cat([row.to(dtype) for row in rows]), b, blocks)


@dataclass(frozen=True)
class LoraFactors:
    """The LoRA factors of a projection in the compute dtype."""

    a: Tensor | None
    """(R, in), the updates stacked."""
    b: Tensor | None
    """(out, R), block diagonal, scaled."""
    blocks: list[tuple[slice, slice, float]]
    """Rows and columns of each update in `b`, and its scale."""

    def forward(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, dropped: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Compute the output (T, out) from `x` (T, in), and return the low-rank states (T, R) too.

        Args:
            dropped: input of the update after dropout; `x` if there is none.
        """
        if self.a is None or self.b is None:
            return nn.functional.linear(x, weight, bias), None
        low = (x if dropped is None else dropped) @ self.a.T
        y = low @ self.b.T
        if bias is not None:
            y += bias
        return y.addmm_(x, weight.T), low

    def low(self, x: Tensor) -> Tensor | None:
        """Compute only the low-rank states (T, R)."""
        return None if self.a is None else x @ self.a.T

    def backward_low(self, grad: Tensor) -> Tensor | None:
        """Compute the gradient of the low-rank states (T, R) from the output's (T, out)."""
        return None if self.b is None else grad @ self.b

    def backward_input(self, grad: Tensor, grad_low: Tensor | None, weight: Tensor) -> Tensor:
        """Compute the gradient of the input (T, in)."""
        if self.a is None or grad_low is None:
            return grad @ weight
        return (grad_low @ self.a).addmm_(grad, weight)

    def backward_update(
        self, grad: Tensor, grad_low: Tensor | None, x: Tensor, low: Tensor | None
    ) -> list[Tensor]:
        """Compute the gradients of each A and B, alternating, in float32."""
        if grad_low is None or low is None:
            return []
        grad_a = grad_low.T @ x
        grads = []
        for outs, ranks, scale in self.blocks:
            grads.append(grad_a[ranks].float())
            grads.append((grad[:, outs].T @ low[:, ranks]).float().mul_(scale))
        return grads


def base_layer_of(linear: nn.Module) -> Any:
    """Return the base layer of a LoRA layer, or a plain layer itself."""
    return linear.base_layer if hasattr(linear, "lora_A") else linear


def active_adapter_of(linear: Any) -> str:
    """Return the name of the only active adapter."""
    (name,) = linear.active_adapters
    return str(name)
