"""Check on the device that products with quantized weights are right, before anything uses them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qlora_cli.errors import ModelError
from qlora_cli.kernels.four_bit import has_product

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROWS = (1, 7, 300)
"""Rows of a product: a token of generation, a few, and a micro-batch, each with its own kernel."""

_TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 2e-2}
"""Allowed error of a product relative to its norm. Rounding is a fifth of it or less."""

_TOLERANCE_8_BIT = 5e-2
"""The same for LLM.int8(), which quantizes the other factor too."""


def check_products(base: PreTrainedModel, dtype: torch.dtype) -> None:
    """Compare products with one quantized weight of a model with those that the CPU computes.

    bitsandbytes has other kernels for each card, number of rows and dtype, and one that is wrong
    would train and answer without an error. The smallest quantized layer is taken, so this takes
    milliseconds.

    Args:
        dtype: compute dtype.

    Raises:
        ModelError: a product or a dequantized weight differs by more than rounding.
    """
    linear = _smallest_quantized(base)
    if linear is None:
        return
    generator = torch.Generator().manual_seed(0)
    for what, found, expected, allowed in _comparisons(linear, dtype, generator):
        error = float((found.cpu().float() - expected).norm() / expected.norm())
        if not error <= allowed:  # also NaN
            raise _wrong_product(base.device, what, error, allowed)


def _wrong_product(device: torch.device, what: str, error: float, allowed: float) -> ModelError:
    import bitsandbytes

    return ModelError(
        f"bitsandbytes {bitsandbytes.__version__} computes wrong values on this {device.type} "
        f"device: {what} differs from the CPU's by {error:.2g} of its size (allowed: {allowed:g})",
        hint="install another version of bitsandbytes, or --set quantization.type=none",
    )


def _smallest_quantized(base: PreTrainedModel) -> Any:
    from bitsandbytes.nn import Linear8bitLt

    # CPUs differ in how they dequantize rows that are not whole blocks. No real model has such.
    found: list[Any] = [
        one for one in base.modules() if isinstance(one, Linear8bitLt) or has_product(one)
    ]
    return min(found, key=lambda one: one.in_features * one.out_features, default=None)


@torch.no_grad()
def _comparisons(
    linear: Any, dtype: torch.dtype, generator: torch.Generator
) -> Iterator[tuple[str, Tensor, Tensor, float]]:
    """Yield what is compared, the device's value, the CPU's in float32, and the allowed error."""
    import bitsandbytes
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    device, is_4bit = linear.weight.device, isinstance(linear, Linear4bit)
    state: Any = linear.weight.quant_state if is_4bit else None
    if is_4bit:
        on_host = copy.deepcopy(state)
        on_host.to("cpu")
        weight = dequantize_4bit(linear.weight.data.cpu(), on_host).float()
        allowed = max(_TOLERANCE[state.dtype], _TOLERANCE[dtype])
        yield "a dequantized weight", dequantize_4bit(linear.weight.data, state), weight, allowed
    else:
        scales = linear.state.SCB if linear.weight.SCB is None else linear.weight.SCB
        weight = linear.weight.data.cpu().float() * (scales.cpu().float()[:, None] / 127)
    bias = 0 if linear.bias is None else linear.bias.cpu().float()
    for rows in ROWS:
        x = torch.randn(rows, linear.in_features, generator=generator).to(dtype)
        expected = x.float() @ weight.T
        # Float32 too, in which adapters multiply in generation.
        for used in dict.fromkeys((dtype, torch.float32)) if is_4bit else (dtype,):
            what = f"a product of {rows} rows in {str(used).removeprefix('torch.')}"
            there = x.to(device, used)
            if is_4bit:
                found = bitsandbytes.matmul_4bit(there, linear.weight, state)
                yield what, found, expected, allowed
            else:
                yield what, linear(there), expected + bias, _TOLERANCE_8_BIT
