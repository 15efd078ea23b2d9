"""Factors of low-rank updates that are computed from several tensors, and their initial values.

Such a factor replaces `lora_A` or `lora_B` in a PEFT layer, which reads only its `weight`: the
update is computed like any other, and saved as ordinary LoRA.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qlora_cli.errors import ModelError

if TYPE_CHECKING:
    from peft import PeftModel

ADAPTER = "default"
_PREFIX = "base_model.model."


class Factor(nn.Module):
    """A replacement for a linear layer without a bias."""

    bias = None

    @property
    def weight(self) -> Tensor:
        """(out, in)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return F.linear(x, self.weight)


class OffsetFactor(Factor):
    """A trained factor, concatenated with its initial value.

    With initial values A0 and B0, the update is B A - B0 A0 = [B, -B0] [A; A0]. It is initially
    zero although neither factor is, so the base need not be changed.

    Args:
        first: A0 (R, in), or B0 (out, R).
        dim: 0 stacks A0 below A, 1 puts B0 to the right of B.
        sign: sign of the initial value: -1 in one of the two factors.
    """

    first: Tensor

    def __init__(self, first: Tensor, *, dim: int, sign: int) -> None:
        super().__init__()
        self.trained = nn.Parameter(first.clone())
        # Saved in checkpoints: another machine would compute it with other rounding.
        self.register_buffer("first", first * sign)
        self._dim = dim

    @property
    def weight(self) -> Tensor:
        """(2R, in), or (out, 2R)."""
        return torch.cat([self.trained, self.first], self._dim)


class ScaledFactor(Factor):
    """The factor A of AdaLoRA, with a scale for each row: the update is B diag(values) directions.

    Its buffers hold the running statistics of the importance of both factors.

    Args:
        directions: (R, in).
        num_out: rows of B.
    """

    kept: Tensor
    """(R, 1): 0 for ranks that were removed in the last allocation, otherwise 1."""

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
    """Yield PEFT's layers with a low-rank update of a linear layer, by their names in the base."""
    from peft.tuners.lora import LoraLayer

    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and ADAPTER in module.lora_A:
            yield name.removeprefix(_PREFIX), module


def linear_updates(adapted: PeftModel, setting: str) -> dict[str, Any]:
    """Return the PEFT layers with a low-rank update, by their names in the base.

    Args:
        setting: the setting that works only for linear layers, for the message.

    Raises:
        ModelError: one of the updates is not of a linear layer.
    """
    layers = dict(low_rank_layers(adapted))
    for parameter, _ in adapted.named_parameters():
        name = parameter.partition(".lora_")[0].removeprefix(_PREFIX)
        if ".lora_" in parameter and name not in layers:
            raise ModelError(
                f"{setting} works only for linear layers, and {name} is not one",
                hint="leave it out of adapter.target_modules; adapter.modules_to_save trains it",
            )
    return layers


def plain_lora_state(model: PeftModel) -> dict[str, Any]:
    """Return the state of a model with each `Factor` as a plain matrix."""
    state: dict[str, Any] = model.state_dict()
    for name, module in model.named_modules():
        if isinstance(module, Factor):
            for key in [key for key in state if key.startswith(f"{name}.")]:
                del state[key]
            state[f"{name}.weight"] = module.weight.detach()
    return state


def set_factors(layer: Any, a: Tensor, b: Tensor) -> None:
    """Make a PEFT layer of rank 2R train factors of rank R with initial values `a` and `b`."""
    layer.lora_A[ADAPTER] = OffsetFactor(a, dim=0, sign=1)
    layer.lora_B[ADAPTER] = OffsetFactor(b, dim=1, sign=-1)


@torch.no_grad()
def pissa_factors(
    weight: Tensor, rank: int, scale: float, steps: int | None
) -> tuple[Tensor, Tensor]:
    """Compute PiSSA's factors: scale * B A is the best approximation of `weight` of this rank.

    (Meng et al. 2024, equations 2 and 3.)

    Args:
        weight: (out, in) float32.
        steps: steps of a subspace iteration; None computes the full decomposition.

    Returns:
        A (R, in) and B (out, R), each with the square roots of the singular values.
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
    """Compute OLoRA's factors: the first rows of R and columns of Q of `weight = Q R`.

    (Buyukakyuz 2024, algorithm 1.)

    Args:
        weight: (out, in) float32.

    Returns:
        A (R, in) and B (out, R); the columns of B are orthonormal.
    """
    q, r = torch.linalg.qr(weight)
    return r[:rank].contiguous(), q[:, :rank].contiguous()


@torch.no_grad()
def dequantized_base_weight(layer: Any) -> Tensor:
    """Return the base weight of a PEFT layer, (out, in) float32, dequantized if necessary."""
    from bitsandbytes.nn import Linear8bitLt

    from qlora_cli.kernels.lora_linear import base_weight

    base = layer.get_base_layer()
    if isinstance(base, Linear8bitLt):
        # The largest value of each row is stored as 127. The first forward moves the scales from
        # the weight to the state.
        weight: Any = base.weight
        scales = base.state.SCB if weight.SCB is None else weight.SCB
        whole: Tensor = weight.data.float() * (scales.float()[:, None] / 127)
        return whole
    found = base_weight(base, torch.float32)
    return found.T if layer.fan_in_fan_out else found
