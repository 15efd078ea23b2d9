"""Compute dtypes: their names, and which of them is fast on a CPU."""

from __future__ import annotations

import torch

from qlora_cli.errors import RecipeError

PRECISIONS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
"""Compute dtypes and their names in `training.precision`."""


def no_bfloat16(device: str) -> RecipeError:
    """Return the error for a recipe that says bf16 on a device without it."""
    return RecipeError(
        f"training.precision: bf16 is not available on {device}",
        hint="--set training.precision=auto uses the best that the device has",
    )


def cpu_is_fast_in_bfloat16() -> bool:
    """Tell if bfloat16 products are faster than float32 ones on this CPU.

    Decided by the CPU's name and not by a timing, so that a resumed run gets the same answer. With
    AVX-512, bfloat16 products run at twice the rate of float32 on AMD and half the rate on Intel;
    AMX is many times faster (`dev/LOG.md`).
    """
    has = torch.cpu.get_capabilities()
    is_amd = str(has.get("cpu_name", "")).startswith("AMD")
    return bool(has.get("amx_bf16")) or (is_amd and bool(has.get("avx512_bf16")))
