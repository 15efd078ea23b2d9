"""Which kernels a run gets: a function of recipe, data, model and machine, so that it repeats."""

from __future__ import annotations

import importlib.util
import os
import shutil
from typing import Literal

from qlora_cli.errors import RecipeError

Kernels = Literal["compiled", "fused", "plain"]
"""Layers as one function with compiled element-wise work; the same without a compiler; or the
layers as transformers has them."""

_WORTH_COMPILING = {"cpu": 3e13, "cuda": 1e16}
"""Weights times tokens of a run whose compiled kernels win back the time that compiling takes.
Measured on a CPU (`dev/LOG.md`); on a GPU it is what about five minutes of an H100 come to."""


def choose_kernels(wanted: Literal["auto"] | Kernels, device: str, work: float) -> Kernels:
    """What `training.kernels` means here.

    Args:
        device: type of the device.
        work: weights of the model times tokens of the whole run.

    Raises:
        RecipeError: compiled kernels are asked for by name, and nothing here can compile them.
    """
    if wanted == "auto":
        is_worth_it = work >= _WORTH_COMPILING.get(device, float("inf"))
        return "compiled" if is_worth_it and has_compiler(device) else "fused"
    if wanted == "compiled" and not has_compiler(device):
        needed = "the package triton" if device == "cuda" else "a C++ compiler (g++ or clang++)"
        raise RecipeError(
            f"training.kernels: compiled was asked for, and torch.compile needs {needed}",
            hint="install it, or --set training.kernels=fused",
        )
    return wanted


def has_compiler(device: str) -> bool:
    """Whether torch.compile finds what it needs."""
    if device == "cuda":
        return importlib.util.find_spec("triton") is not None
    return any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++"))
