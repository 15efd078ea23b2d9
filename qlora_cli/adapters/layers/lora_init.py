"""Factors of a low-rank update that are more than one trained matrix.

Each takes the place of `lora_A` or `lora_B` in a layer of PEFT, which asks it for its `weight`: so
the update is an ordinary one for whoever computes it, and ordinary LoRA when it is saved.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from peft import PeftModel

ADAPTER = "default"
_PREFIX = "base_model.model."


class Factor(nn.Module):
    """In the place of a linear layer without a bias."""

    bias = None

    @property
    def weight(self) -> Tensor:
        """(out, in)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return F.linear(x, self.weight)


class OffsetFactor(Factor):
    """A trained factor, and beside it what it began as.

    With A0 and B0 for what they began as, the update is B A - B0 A0 = [B, -B0] [A; A0]. It is zero
    at first, although neither factor is, and the base need not be changed.

    Args:
        first: A0 (R, in), or B0 (out, R).
        dim: 0 for A0 below A, 1 for B0 beside B.
        sign: -1 on one of the two.
    """

    first: Tensor

    def __init__(self, first: Tensor, *, dim: int, sign: int) -> None:
        super().__init__()
        self.trained = nn.Parameter(first.clone())
        # A checkpoint keeps it: another machine would find it with another rounding.
        self.register_buffer("first", first * sign)
        self._dim = dim

    @property
    def weight(self) -> Tensor:
        """(2R, in), or (out, 2R)."""
        return torch.cat([self.trained, self.first], self._dim)


class ScaledFactor(Factor):
    """The factor A of rows with a weight each: the update is B diag(values) directions.

    Beside it is what AdaLoRA knows of the importance of both factors.

    Args:
        directions: (R, in).
        num_out: rows of B.
    """

    kept: Tensor
    """(R, 1), 0 for what was taken away last."""

    def __init__(self, directions: Tensor, num_out: int) -> None:
        super().__init__()
        rank = len(directions)
        self.directions = nn.Parameter(directions)
        self.values = nn.Parameter(directions.new_zeros(rank, 1))
        shapes = {"a": directions.shape, "values": (rank, 1), "b": (num_out, rank)}
        for name, shape in shapes.items():
            self.register_buffer(f"mean_{name}", directions.new_zeros(shape))
            self.register_buffer(f"spread_{name}", directions.new_zeros(shape))
        self.register_buffer("kept", directions.new_ones(rank, 1))

    @property
    def weight(self) -> Tensor:
        """(R, in)."""
        return self.directions * self.values


def low_rank_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """PEFT's layers with a low-rank update of a linear layer, by their names in the base."""
    from peft.tuners.lora import LoraLayer

    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and ADAPTER in module.lora_A:
            yield name.removeprefix(_PREFIX), module


def plain_lora_state(model: PeftModel) -> dict[str, Any]:
    """The state of a model as if all factors were plain matrices."""
    state: dict[str, Any] = model.state_dict()
    for name, module in model.named_modules():
        if isinstance(module, Factor):
            for key in [key for key in state if key.startswith(f"{name}.")]:
                del state[key]
            state[f"{name}.weight"] = module.weight.detach()
    return state


def set_factors(layer: Any, a: Tensor, b: Tensor) -> None:
    """Have a layer of PEFT, of rank 2R, train factors of rank R that begin as `a` and `b`."""
    layer.lora_A[ADAPTER] = OffsetFactor(a, dim=0, sign=1)
    layer.lora_B[ADAPTER] = OffsetFactor(b, dim=1, sign=-1)


@torch.no_grad()
def pissa_factors(
    weight: Tensor, rank: int, scale: float, steps: int | None
) -> tuple[Tensor, Tensor]:
    """PiSSA: scale * B A is the best approximation of a weight of this rank (Meng et al. 2024,
    equations 2 and 3).

    Args:
        weight: (out, in) float32.
        steps: of a subspace iteration, in place of the whole decomposition.

    Returns:
        A (R, in) and B (out, R), which share the singular values.
    """
    if steps is None:
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    else:
        u, s, v = torch.svd_lowrank(weight, rank, niter=steps)
        vh = v.mT
    root = (s[:rank] / scale).sqrt()
    return (root[:, None] * vh[:rank]).contiguous(), (u[:, :rank] * root).contiguous()


@torch.no_grad()
def olora_factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """OLoRA: the first rows of R and columns of Q of a weight (Buyukakyuz 2024, algorithm 1).

    Args:
        weight: (out, in) float32.

    Returns:
        A (R, in) and B (out, R); the columns of B are orthonormal.
    """
    q, r = torch.linalg.qr(weight)
    return r[:rank].contiguous(), q[:, :rank].contiguous()


@torch.no_grad()
def dequantized_base_weight(layer: Any) -> Tensor:
    """What a layer of PEFT is beside, (out, in) float32, dequantized where it is quantized."""
    from bitsandbytes.nn import Linear8bitLt

    from qlora_cli.kernels.lora_linear import base_weight

    base = layer.get_base_layer()
    if isinstance(base, Linear8bitLt):
        # Each row has its largest value as 127; the first forward takes the scales to the state.
        weight: Any = base.weight
        scales = base.state.SCB if weight.SCB is None else weight.SCB
        whole: Tensor = weight.data.float() * (scales.float()[:, None] / 127)
        return whole
    found = base_weight(base, torch.float32)
    return found.T if layer.fan_in_fan_out else found
