"""Compute dtypes: names, and which of them a device is fast in."""

from __future__ import annotations

import torch

from qlora_cli.errors import RecipeError

PRECISIONS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
"""What a step computes in, and how `training.precision` calls it."""


def no_bfloat16(device: str) -> RecipeError:
    """What to raise where bf16 was asked for by name and a device has none."""
    return RecipeError(
        f"training.precision: bf16 was asked for, and {device} has none",
        hint="--set training.precision=auto takes the best that the device has",
    )


def cpu_is_fast_in_bfloat16() -> bool:
    """By its name and not by a trial: a run that is resumed has to find the same answer.

    Of the instructions of AVX-512, products in bfloat16 have twice the rate of those in float32 on
    AMD's and half the rate on Intel's; AMX is many times as fast (`dev/LOG.md`).
    """
    has = torch.cpu.get_capabilities()
    is_amd = str(has.get("cpu_name", "")).startswith("AMD")
    return bool(has.get("amx_bf16")) or (is_amd and bool(has.get("avx512_bf16")))
