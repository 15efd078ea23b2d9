"""Compiled functions are compiled once for all numbers of tokens, and once for each width.

The compiler here is torch's `eager`: it takes the same decisions, and writes no code.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from qlora_cli.kernels.compiling import CompiledFunction
from qlora_cli.kernels.cross_entropy import _to_be_compiled
from qlora_cli.kernels.elementwise import _TOKEN_AXES, Elementwise
from qlora_cli.kernels.fusible import fusible_constants
from qlora_cli.objectives.supervised import TokenLoss
from qlora_cli.types import Batch
from tests.parity.tiny_layers import adapted, base, fused

# torch.compile imports parts of torch that warn of their own age.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def by_eager(function: Callable[..., object]) -> CompiledFunction:
    return CompiledFunction(function, _TOKEN_AXES[function.__name__], backend="eager")


def compilations(ops: Elementwise) -> dict[str, int]:
    return {
        field.name: getattr(ops, field.name).num_compilations
        for field in fields(ops)
        if field.name != "is_compiled"
    }


def run_swiglu(function: CompiledFunction, rows: int, width: int) -> None:
    gate_up = torch.randn(rows, 2 * width)
    with torch.no_grad():
        assert function(gate_up).shape == (rows, width)


def test_five_token_counts_and_two_widths_are_compiled_twice() -> None:
    ops = Elementwise.compiled(by=by_eager)
    for width, number in ((48, 1), (64, 2)):
        for rows in (512, 37, 130, 700, 64):
            run_swiglu(ops.swiglu, rows, width)  # type: ignore[arg-type]  # it is a CompiledFunction
            assert ops.swiglu.num_compilations == number  # type: ignore[attr-defined]  # as above


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_steps_compile_nothing_after_the_try(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Each step has other documents: one, several, of one block of attention and of more."""
    model = adapted(base(kind, tmp_path / "base", dtype, "nf4"), ours=True)
    constants = fusible_constants(model)
    assert constants is not None
    ops = Elementwise.compiled(by=by_eager)
    loss_kernel = CompiledFunction(_to_be_compiled, {0: (0,), 1: (0,)}, backend="eager")
    with torch.no_grad():
        ops.try_out(torch.device("cpu"), dtype, constants, norms_heads=kind == "qwen3")
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss_kernel(torch.rand(64, 90, dtype=dtype), torch.arange(64))
    tried = compilations(ops)
    objective = TokenLoss(fused(model, "all", ops), dtype, loss_kernel)
    for documents in ((7, 3, 40, 13), (200, 150), (5,), (333, 20, 300), (130, 129)):
        ids = torch.randint(0, 90, (1, sum(documents)))
        objective(Batch(ids, None, ids.clone(), documents))[0].backward()
    assert compilations(ops) == tried
    assert loss_kernel.num_compilations == 1
    rotated = {"rotate"} if kind == "qwen3" else {"norm_rotate", "norm_rotate_backward"}
    assert {name for name, number in tried.items() if number == 0} == rotated
    assert sum(tried.values()) <= len(tried) - len(rotated) + 1  # views and gradients are rotated


def test_the_limit_of_torch_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    function = by_eager(Elementwise().swiglu)
    for width in range(8, 8 + 2 * 10, 2):
        run_swiglu(function, 40, width)
    [record] = [one for one in caplog.records if one.name == "qlora"]
    assert record.levelno == logging.WARNING
    assert record.message.startswith("kernels: swiglu was compiled 6 times")
    assert record.message.endswith("use --set training.kernels=fused")
    assert function.num_compilations == torch._dynamo.config.recompile_limit
