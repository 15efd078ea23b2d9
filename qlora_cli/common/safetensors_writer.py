"""The safetensors format, for writers that hold one tensor at a time.

https://huggingface.co/docs/safetensors/index#format
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64",
    "U16": "uint16", "U32": "uint32", "U64": "uint64",
    "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip
"""Name of each dtype in safetensors -> name in torch."""


def item_bytes(dtype: str) -> int:
    """Return the bytes per value of a dtype in `DTYPES`."""
    digits = re.match(r"[A-Z]+([0-9]+)", dtype)
    return int(digits[1]) // 8 if digits else 1  # BOOL


_NAMES = {torch_name: name for name, torch_name in DTYPES.items()}


def header_of(
    layout: Mapping[str, tuple[str, tuple[int, ...], int]], metadata: Mapping[str, str]
) -> bytes:
    """Return the header of a file. The bytes of the tensors follow it in the order of `layout`.

    Args:
        layout: name -> dtype (of safetensors), shape and size in bytes of each tensor.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, (dtype, shape, size) in layout.items():
        start, end = end, end + size
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def file_of(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """Yield a whole file piece by piece, with one GPU tensor at a time copied to the host."""
    yield header_of(
        {
            name: (_NAMES[str(one.dtype).removeprefix("torch.")], tuple(one.shape), one.nbytes)
            for name, one in tensors.items()
        },
        {},
    )
    for tensor in tensors.values():
        yield bytes_of(tensor.cpu())


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the values of a tensor as stored bytes."""
    import torch

    flat: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)
