"""Replay what library kernels allocate while they work, in addition to their results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qlora_cli.distributed.devices import Device

Kernel = Callable[..., Any]

# On a CPU these are C functions that write to their result. All other bitsandbytes operations are
# composed of torch's there, and are traced as such.
_CLOSED = {
    "bitsandbytes::dequantize_4bit",
    "bitsandbytes::dequantize_blockwise",
    "bitsandbytes::gemv_4bit",
    "bitsandbytes::quantize_blockwise",
}


def decompose(name: str, device: Device) -> Kernel | None:
    """Return how an operation decomposes on a device; None if it is a single kernel there."""
    if device == "cuda":
        return _CUDA.get(name)
    if name in _CLOSED or not name.startswith("bitsandbytes::"):
        return None
    kernel: Any = torch.library.get_kernel(name, "CPU")
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    return lambda *args, **kwargs: kernel.call_boxed(keys, *args, **kwargs)


def _multiply_4bit(
    rows: Tensor,
    packed: Tensor,
    shape: list[int],
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    bias: Tensor | None = None,
    *double_quant: Tensor,
) -> Tensor:
    """Multiply by a 4-bit weight that is dequantized first.

    bitsandbytes does this for many rows (always above 1,536). For fewer rows it may use a kernel
    that never holds the weight, depending on the card, so this is the maximum.

    Args:
        double_quant: `absmax` in 8 bits, its code and its offset, where it is quantized too.
    """
    ops = torch.ops.bitsandbytes
    if double_quant:  # torch leaves out trailing arguments that equal their defaults
        quantized, code, offset = double_quant
        absmax = ops.dequantize_blockwise(quantized, absmax, code, 256, torch.float32)
        absmax = absmax + offset
    weight = ops.dequantize_4bit(packed, absmax, blocksize, quant_type, shape, rows.dtype)
    return torch.nn.functional.linear(rows, weight, bias)


def _attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any
) -> tuple[Tensor, ...]:
    """Allocate like CUDA's flash attention, which sums the gradient of queries in float32."""
    total = torch.empty_like(query, dtype=torch.float32)
    made = (torch.empty_like(query), torch.empty_like(key), torch.empty_like(value))
    del total
    return made


def _varlen_attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    normalizer: Tensor,
    ends: Tensor,
    *rest: Any,
    **options: Any,
) -> tuple[Tensor, ...]:
    """Allocate like flash attention 2's `mha_varlen_bwd`.

    Each document starts a new block of 128 rows. If there are fewer heads of keys than of queries,
    their gradients are summed at the end.
    """
    tokens, heads, size = query.shape
    rows, width = tokens + 128 * (len(ends) - 1), -(-size // 32) * 32
    made = (torch.empty_like(query), torch.empty_like(key), torch.empty_like(value))
    shared = query.new_empty(heads, rows, dtype=torch.float32)
    total = query.new_empty(rows, heads, width, dtype=torch.float32)
    of_heads = [torch.empty_like(query) for _ in range(2) if key.shape[1] < heads]
    del shared, total, of_heads
    return made


def _quantize_int8(rows: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor | None]:
    """Quantize rows to 8 bits, each with its scale, without outlier columns."""
    outliers = None
    if threshold > 0:
        found = rows.abs() >= threshold
        del found
        outliers = torch.empty(0, dtype=torch.int64)
    scales = rows.new_empty(rows.numel() // rows.shape[-1], dtype=torch.float32)
    return torch.empty_like(rows, dtype=torch.int8), scales, outliers


def _multiply_int8(
    rows: Tensor,
    quantized: Tensor,
    weight: Tensor,
    row_scales: Tensor,
    weight_scales: Tensor,
    outliers: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Multiply in 32-bit integers, then convert to float16 and to the dtype of the rows.

    The 16-bit `rows` are for the few outlier columns.
    """
    shape = (*quantized.shape[:-1], weight.shape[0])
    integers = torch._int_mm(quantized.flatten(0, -2), weight.t()).view(shape)
    half = torch.empty_like(integers, dtype=torch.float16)
    del integers
    return half.to(rows.dtype), rows.new_empty(0)


_CUDA: dict[str, Kernel] = {
    "bitsandbytes::gemm_4bit": _multiply_4bit,
    "bitsandbytes::int8_vectorwise_quant": _quantize_int8,
    "bitsandbytes::int8_mixed_scaled_mm": _multiply_int8,
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
    "torch_attn::_varlen_attn_backward": _varlen_attention_backward,
}
