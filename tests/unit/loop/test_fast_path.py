"""Compiled kernels are used only if they compute what the plain ones do."""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from qlora_cli.errors import ModelError
from qlora_cli.kernels.cross_entropy import cross_entropy
from qlora_cli.loop.fast_path import (
    ComputeOptions,
    _can_compile,
    prepare_layers,
    use_padding_free,
)
from qlora_cli.types import Example
from tests.parity.tiny_layers import adapted, base

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


# torch.compile imports parts of torch that warn of their own age.
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_layers_get_compiled_kernels_if_they_compute_the_same(
    tmp_path: Path, kind: str, dtype: torch.dtype
) -> None:
    inner = base(kind, tmp_path / "base", dtype, "none")
    model, options = adapted(inner, ours=True), ComputeOptions(dtype, "compiled")
    before = torch.get_rng_state()
    with torch.compiler.set_stance("force_eager"):  # compiles nothing: the functions are equal
        assert prepare_layers(model, inner, checkpointing=False, options=options) == "compiled"
    assert torch.equal(torch.get_rng_state(), before)


# torch.compile imports parts of torch that warn of their own age.
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_layers_are_fused_if_nothing_can_be_compiled(tmp_path: Path) -> None:
    inner = base("llama", tmp_path / "base", torch.float32, "none")
    model, options = adapted(inner, ours=True), ComputeOptions(torch.float32, "compiled")
    with torch.compiler.set_stance("fail_on_recompile"):
        assert prepare_layers(model, inner, checkpointing=False, options=options) == "fused"


def test_a_refused_model_keeps_the_attention_of_the_recipe(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*arguments: object) -> None:
        raise ModelError("it does not accept packed examples")

    monkeypatch.setattr("qlora_cli.loop.fast_path.check_packing", refuse)
    config = LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.config._attn_implementation = "flash_attention_2"  # its package needs a card
    training: Any = SimpleNamespace(examples=[Example([1, 2, 3], [1, 2, 3])] * 4)
    tokenizer: Any = SimpleNamespace(pad_token_id=0)
    cpu = torch.device("cpu")
    assert not use_padding_free(model, training, tokenizer, torch.float32, cpu, packing=False)
    assert model.config._attn_implementation == "flash_attention_2"
