"""Linear layers with LoRA, computed in the order that keeps small updates from being rounded away.

The usual order adds the update to an output that is rounded already. In bfloat16, most of a small
update is below half a unit in the last place and is lost. Here the update is computed first and the
base matmul is accumulated onto it, with one rounding at the end: y = (x A^T) (s B)^T, then
y += x W^T (`docs/speed.md`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from qlora_cli.kernels.dropout import SeededDropout
from qlora_cli.kernels.merged_weight import MergedWeight, merge_weights


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
    merged: MergedWeight | None = None
    """Their weights, if they are in one tensor."""

    @classmethod
    def merging(cls, linears: Sequence[nn.Module]) -> Projection:
        """Make a projection, and move the frozen weights into one tensor where that is possible."""
        return cls(linears, merge_weights([base_layer_of(linear) for linear in linears]))

    @cached_property
    def adapted(self) -> list[Any]:
        """Return the layers with a LoRA update."""
        return [linear for linear in self.linears if hasattr(linear, "lora_A")]

    @cached_property
    def base_layers(self) -> list[Any]:
        """Return the layers without their updates."""
        return [base_layer_of(linear) for linear in self.linears]

    def trained(self) -> list[Tensor]:
        """Return A (R, in) and B (out, R) of each update, alternating."""
        found: list[Tensor] = []
        for linear in self.adapted:
            name = active_adapter_of(linear)
            found += (linear.lora_A[name].weight, linear.lora_B[name].weight)
        return found

    def dropout_rate(self) -> float:
        """Return the rate of dropout of the updates, which have the same; 0 in evaluation mode."""
        return max((dropout_rate_of(linear) for linear in self.adapted), default=0.0)

    def weight(self, dtype: torch.dtype) -> Tensor:
        """Return the stacked weights (out, in)."""
        if self.merged is not None and self.merged.is_current:
            return self.merged.dequantize().to(dtype)
        layers = self.base_layers
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
        biases: list[Any] = [layer.bias for layer in self.base_layers]
        if all(bias is None for bias in biases):
            return None
        widths = [layer.out_features for layer in self.base_layers]
        one = next(bias for bias in biases if bias is not None)
        filled = [
            one.new_zeros(width) if bias is None else bias.detach()
            for bias, width in zip(biases, widths, strict=True)
        ]
        return torch.cat([bias.to(dtype) for bias in filled])

    def factors(self, trained: Sequence[Tensor], dtype: torch.dtype) -> LoraFactors:
        """Make the LoRA factors in a dtype from the weights that `trained` returns."""
        rows = list(trained[0::2])
        if not rows:
            return LoraFactors(None, None, [])
        scales = [float(linear.scaling[active_adapter_of(linear)]) for linear in self.adapted]
        ranks = [row.shape[0] for row in rows]
        outs = [int(layer.out_features) for layer in self.base_layers]
        a = rows[0].new_empty((sum(ranks), rows[0].shape[1]), dtype=dtype)
        torch._foreach_copy_(a.split(ranks), rows)
        b = rows[0].new_zeros((sum(outs), sum(ranks)), dtype=dtype)
        columns = torch._foreach_mul(list(trained[1::2]), scales)
        updates = iter(zip(columns, ranks, scales, strict=True))
        blocks, top, left = [], 0, 0
        for linear, out in zip(self.linears, outs, strict=True):
            if hasattr(linear, "lora_A"):
                column, rank, scale = next(updates)
                block = slice(top, top + out), slice(left, left + rank)
                b[block] = column
                blocks.append((*block, scale))
                left += rank
            top += out
        return LoraFactors(a, b, blocks)


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

    def backward_input(
        self,
        grad: Tensor,
        grad_low: Tensor | None,
        weight: Tensor,
        dropout: SeededDropout | None = None,
    ) -> Tensor:
        """Compute the gradient of the input (T, in)."""
        if self.a is None or grad_low is None:
            return grad @ weight
        of_update = grad_low @ self.a
        if dropout is not None:
            of_update = dropout.apply(of_update)
        return of_update.addmm_(grad, weight)

    def backward_update(
        self, grad: Tensor, grad_low: Tensor | None, x: Tensor, low: Tensor | None
    ) -> list[Tensor]:
        """Compute the gradients of each A and of each scaled B, alternating."""
        if grad_low is None or low is None:
            return []
        grad_a = grad_low.T @ x
        grads = []
        for outs, ranks, _ in self.blocks:
            grads.append(grad_a[ranks])
            grads.append(grad[:, outs].T @ low[:, ranks])
        return grads

    @property
    def scales(self) -> list[float]:
        """Return the scale of each update."""
        return [scale for *_, scale in self.blocks]


@dataclass(frozen=True)
class ProjectionPass:
    """A projection on one micro-batch, forward and backward, in one dtype."""

    linears: Projection
    factors: LoraFactors
    dtype: torch.dtype
    dropout: SeededDropout | None = None
    """One mask for all updates, as they have the same input."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Compute the output (T, out) from `x` (T, in), and return the low-rank states (T, R)."""
        weight, bias = self.linears.weight(self.dtype), self.linears.bias(self.dtype)
        return self.factors.forward(x, weight, bias, self._dropped(x))

    def low(self, x: Tensor) -> Tensor | None:
        """Compute only the low-rank states (T, R)."""
        return self.factors.low(self._dropped(x))

    def backward_low(self, grad: Tensor) -> Tensor | None:
        """Compute the gradient of the low-rank states (T, R) from the output's (T, out)."""
        return self.factors.backward_low(grad)

    def backward_input(self, grad: Tensor, grad_low: Tensor | None) -> Tensor:
        """Compute the gradient of the input (T, in)."""
        weight = self.linears.weight(self.dtype)
        return self.factors.backward_input(grad, grad_low, weight, self.dropout)

    def backward_update(
        self, grad: Tensor, grad_low: Tensor | None, x: Tensor, low: Tensor | None
    ) -> list[Tensor]:
        """Compute the gradients of each A and of each scaled B, alternating."""
        return self.factors.backward_update(grad, grad_low, self._dropped(x), low)

    def _dropped(self, x: Tensor) -> Tensor:
        return x if self.dropout is None else self.dropout.apply(x)


def unscaled_gradients(grads: Sequence[Tensor], scales: Sequence[float]) -> list[Tensor]:
    """Return the gradients of A and B in float32, from those of A and of the scaled B, alternating.

    On CUDA, an operation on a list launches one kernel for all of its tensors.
    """
    found = [torch.empty_like(one, dtype=torch.float32) for one in grads]
    if found:
        torch._foreach_copy_(found, list(grads))
        torch._foreach_mul_(found[1::2], list(scales))
    return found


def base_layer_of(linear: nn.Module) -> Any:
    """Return the base layer of a LoRA layer, or a plain layer itself."""
    return linear.base_layer if hasattr(linear, "lora_A") else linear


def dropout_rate_of(linear: Any) -> float:
    """Return the rate of dropout of the input of a LoRA layer's update."""
    dropout = linear.lora_dropout[active_adapter_of(linear)]
    return float(dropout.p) if isinstance(dropout, nn.Dropout) and dropout.training else 0.0


def active_adapter_of(linear: Any) -> str:
    """Return the name of the only active adapter."""
    (name,) = linear.active_adapters
    return str(name)
