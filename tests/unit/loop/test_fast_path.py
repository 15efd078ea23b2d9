"""Compiled kernels are used only if they compute what the plain ones do."""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qlora_cli.kernels.cross_entropy import cross_entropy
from qlora_cli.loop.fast_path import _can_compile

WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "one value": lambda found: found.index_fill(0, torch.tensor([3]), 2.0),
    "one NaN": lambda found: found.index_fill(0, torch.tensor([3]), float("nan")),
    "zeros": torch.zeros_like,
    "the sign": torch.neg,
    "an exponent bit": lambda found: found * 2,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("damage", [None, *WRONG])
def test_kernels_that_compute_something_else_are_not_used(
    damage: str | None, dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "qlora")
    generator = torch.Generator().manual_seed(0)
    logits = torch.rand(16, 64, generator=generator, dtype=dtype)
    loss, gradient = cross_entropy(logits, torch.arange(16))
    change = torch.Tensor.clone if damage is None else WRONG[damage]
    found = {"loss": loss, "gradient": change(gradient)}
    is_used = _can_compile(lambda: found, {"loss": loss, "gradient": gradient})
    assert is_used == (damage is None)
    [line] = caplog.messages
    assert line.startswith("kernels compiled in" if is_used else "compiled kernels are not used")
    assert is_used or "gradient" in line


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Failed to find C compiler. Please specify via CC environment variable."),
        subprocess.CalledProcessError(1, ["gcc", "main.c"], "Python.h: No such file or directory"),
        OSError(28, "No space left on device"),
        ImportError("cannot import name 'driver' from 'triton'"),
        torch._dynamo.exc.BackendCompilerFailed(lambda graph: graph, ValueError("a symbol"), None),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_compiler_that_fails_leaves_the_plain_kernels(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    def run() -> dict[str, Tensor]:
        raise error

    assert not _can_compile(run, {})
    [line] = caplog.messages
    assert line.startswith(
        f"kernels cannot be compiled, so steps are slower: {type(error).__name__}"
    )
