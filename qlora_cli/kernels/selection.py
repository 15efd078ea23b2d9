"""Choose the kernels of a run from recipe, data, model and machine, so that it is repeatable."""

from __future__ import annotations

import importlib.util
import os
import shutil
from typing import Literal

from qlora_cli.errors import RecipeError

Kernels = Literal["compiled", "fused", "plain"]
"""Layers as one function with compiled element-wise work, the same uncompiled, or transformers' own
layers."""

_WORTH_COMPILING = {"cpu": 3e13, "cuda": 3e15}
"""Weights times tokens of a run from which compiled kernels save more time than compiling takes.

Measured on a CPU (`dev/LOG.md`). On a GPU it is an estimate, not verified: uncompiled kernels move
about 17 GB more per layer of an 8B model and 8,192 tokens, a sixth of the time of a step. 3e15 is
375,000 tokens of such a model, where compiling once (20 to 60 seconds) costs about what an RTX 4090
saves (27 seconds); later runs read the kernels from the disk in a few seconds."""


def choose_kernels(wanted: Literal["auto"] | Kernels, device: str, work: float) -> Kernels:
    """Resolve `training.kernels` for this machine.

    Args:
        device: device type.
        work: weights of the model times tokens of the whole run.

    Raises:
        RecipeError: compiled kernels are set explicitly and the compiler is missing.
    """
    if wanted == "auto":
        is_worth_it = work >= _WORTH_COMPILING.get(device, float("inf"))
        return "compiled" if is_worth_it and has_compiler(device) else "fused"
    if wanted == "compiled" and not has_compiler(device):
        needed = "the package triton" if device == "cuda" else "a C++ compiler (g++ or clang++)"
        raise RecipeError(
            f"training.kernels: compiled needs {needed} for torch.compile, which is missing",
            hint="install it, or --set training.kernels=fused",
        )
    return wanted


def has_compiler(device: str) -> bool:
    """Return whether torch.compile finds its compiler."""
    if device == "cuda":
        return importlib.util.find_spec("triton") is not None
    return any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++"))
