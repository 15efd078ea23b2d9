"""Few rows times a 4-bit weight, as in generation, without dequantizing the weight.

bitsandbytes has a kernel that reads the 4-bit values and multiplies at once. For one token of
generation the weights are most of what is read, and dequantizing writes and reads them in 16 bit.
"""

from __future__ import annotations

from typing import Any

import bitsandbytes
import torch
from bitsandbytes.nn import Linear4bit
from torch import Tensor

_ROWS = 7
"""Rows of a call: with more, bitsandbytes 0.50 dequantizes the weight to float32."""

MAX_ROWS = 4 * _ROWS
"""Rows that four calls take. They read 4 x 0.56 bytes of each weight; dequantizing it to 16 bit and
multiplying moves 4.6. Estimated, not measured."""


def has_product(linear: Any) -> bool:
    """Tell if a layer has a 4-bit weight that the kernel can read: rows of whole blocks."""
    if not isinstance(linear, Linear4bit):
        return False
    state: Any = linear.weight.quant_state
    is_aligned: bool = linear.in_features % state.blocksize == 0
    return is_aligned


def multiply(x: Tensor, linear: Any) -> Tensor:
    """Multiply `x` (T, in) with a 4-bit weight, and add the bias of its layer: (T, out) in float32.

    In float32, because the update of an adapter is added to the result before it is rounded.
    """
    bias = None if linear.bias is None else linear.bias.float()
    parts = [
        bitsandbytes.matmul_4bit(rows, linear.weight, linear.weight.quant_state, bias=bias)
        for rows in x.float().split(_ROWS)
    ]
    return torch.cat(parts) if len(parts) > 1 else parts[0]
