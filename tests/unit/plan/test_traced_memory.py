"""Test that a trace without data takes the memory of real tensors."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    LlamaConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
)

from qlora_cli.data.batching.collate import full_batch
from qlora_cli.distributed.devices import Device
from qlora_cli.kernels.device_capabilities import DeviceCapabilities
from qlora_cli.kernels.selection import Kernels
from qlora_cli.loop.fast_path import ComputeOptions
from qlora_cli.plan.dry_run import EVALUATION, FIRST, STEP, dry_run
from qlora_cli.plan.trace.memory_counter import (
    ADAPTER,
    GRADIENTS,
    LOGITS,
    SAVED,
    STATES,
    UNQUANTIZED,
    CountedHostMemory,
    MemoryCounter,
    Segment,
)
from qlora_cli.plan.traced_memory import MemoryTrace, trace_memory
from qlora_cli.recipe.schema import Recipe
from tests.conftest import each_optimizer, make_tokenizer, mostly_slow
from tests.unit.plan.tiny import CPU, LAYERS, RECIPES, WIDE, count_real_run, full_batch_of, peak_of

OPTIMIZERS = [one.type for one in each_optimizer() if not one.is_paged]


IN_BOTH = ("nf4", "int8", "full")
"""Recipes that are traced in both dtypes by default; the others in float32 with the slow tests."""


@pytest.mark.quick_every(4)
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.bfloat16) for name in RECIPES),
        *((name, torch.float32) for name in IN_BOTH),
        *(
            pytest.param(name, torch.float32, marks=pytest.mark.slow)
            for name in RECIPES
            if name not in IN_BOTH
        ),
    ],
    ids=str,
)
def test_trace_equals_real_tensors(
    tiny_recipe: Callable[..., Recipe], name: str, dtype: torch.dtype
) -> None:
    recipe = tiny_recipe(**RECIPES[name])
    config, _ = recipe.model.read_config()
    full = full_batch_of(recipe, 96, padding_free=recipe.data.packing)
    held_out = full_batch_of(recipe, 80, padding_free=False)
    batches = {"steps": [[full, full]], "held_out": held_out}
    real = count_real_run(recipe, dtype, **batches)
    traced = trace_memory(recipe, config, dtype, device="cpu", **batches)
    for stage in (FIRST, STEP, EVALUATION):
        found, truth = traced.peak(stage)[1], peak_of(real.peaks, stage)
        assert found.total == pytest.approx(truth.total, rel=1e-3), stage
    assert traced.flops[STEP] == real.flops[STEP] > 0


def save_qwen3(folder: Path) -> Path:
    """Save a tiny model whose layers normalise each head, with its tokenizer."""
    tokenizer = make_tokenizer()
    config = Qwen3Config(num_hidden_layers=2, pad_token_id=tokenizer.pad_token_id, **LAYERS)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "checkpointing"),
    [
        (torch.bfloat16, True),
        (torch.bfloat16, "mlp"),
        (torch.float32, False),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in ((torch.float32, True), (torch.float32, "mlp"), (torch.bfloat16, False))
        ),
    ],
    ids=str,
)
def test_trace_equals_real_tensors_with_head_norms(
    tiny_recipe: Callable[..., Recipe],
    tmp_path: Path,
    dtype: torch.dtype,
    checkpointing: bool | str,
) -> None:
    recipe = tiny_recipe(
        model={"path": str(save_qwen3(tmp_path / "qwen3"))},
        quantization={"type": "nf4"},
        training={"gradient_checkpointing": checkpointing},
    )
    config, _ = recipe.model.read_config()
    full = full_batch(2, 96, padding_free=True)
    batches: dict[str, Any] = {"steps": [[full, full]], "held_out": None}
    real = count_real_run(recipe, dtype, **batches)
    traced = trace_memory(recipe, config, dtype, device="cpu", **batches)
    for stage in (FIRST, STEP):
        truth = peak_of(real.peaks, stage)
        assert traced.peak(stage)[1].total == pytest.approx(truth.total, rel=1e-3), stage
    assert traced.flops[STEP] == real.flops[STEP] > 0


def test_the_loss_is_traced_in_the_chunks_of_the_planned_device(
    tiny_recipe: Callable[..., Recipe],
) -> None:
    """A CPU computes 24 MiB of float32 logits at a time, a card 128 MiB in tiles of 128 rows."""
    vocabulary = 200_000
    config = LlamaConfig(num_hidden_layers=2, **{**LAYERS, "vocab_size": vocabulary})
    steps = [[full_batch(2, 160, padding_free=True)]]

    def logits(device: Device) -> int:
        found = trace_memory(
            *(tiny_recipe(), config, torch.float32), device=device, steps=steps, held_out=None
        )
        return max(peak.kinds.get(LOGITS, 0) for peak in found.peaks.values())

    rows = 24 * 2**20 // (4 * vocabulary)
    assert logits("cuda") / logits("cpu") == pytest.approx(128 / rows, rel=0.01)


@pytest.mark.slow
def test_offloaded_inputs_are_not_counted_on_the_device(
    tiny_recipe: Callable[..., Recipe],
) -> None:
    def traced(checkpointing: bool | str) -> MemoryTrace:
        recipe = tiny_recipe(
            quantization={"type": "nf4"}, training={"gradient_checkpointing": checkpointing}
        )
        return trace_memory(
            recipe,
            LlamaConfig(num_hidden_layers=6, **LAYERS),
            torch.bfloat16,
            device="cuda",
            steps=[[full]],
            held_out=None,
        )

    full = full_batch(2, 96, padding_free=True)
    kept, moved = traced(True), traced("offload")
    size = 2 * 96 * 32 * 2
    assert kept.host_bytes == 0
    assert moved.host_bytes == 6 * 2 ** math.ceil(math.log2(size))
    # After all layers, when the backward pass begins.
    start = Segment(STEP, "backward", 1, None)
    assert kept.peaks[start].total - moved.peaks[start].total == 6 * size
    assert kept.flops == moved.flops


def test_offloaded_real_inputs_are_counted_on_the_host(tiny_recipe: Callable[..., Recipe]) -> None:
    recipe = tiny_recipe(training={"gradient_checkpointing": "offload"})
    base = recipe.model.load(recipe.quantization.load_options(torch.bfloat16), CPU)
    count = MemoryCounter(vocabulary_size=base.config.vocab_size)
    full = full_batch(2, 96, padding_free=True)
    with count:
        dry_run(
            base,
            recipe,
            count,
            ComputeOptions(
                torch.bfloat16, device=DeviceCapabilities(host=CountedHostMemory(count))
            ),
            steps=[[full]],
            held_out=None,
        )
    assert count.host_bytes == 2 * 2**14  # two layers of 192 x 32 values in two bytes, rounded up


@pytest.mark.parametrize("name", mostly_slow(OPTIMIZERS, *OPTIMIZERS[:2]))
def test_optimizer_states_are_traced(tiny_recipe: Callable[..., Recipe], name: str) -> None:
    """Train all weights: matrices of more than 4,096 weights (8-bit states apply to these), norms.

    A paged optimizer is traced as its unpaged twin.
    """
    recipe = tiny_recipe(adapter={"type": "full"}, optimizer={"type": name})
    config, _ = recipe.model.read_config()
    full = full_batch(1, 16, padding_free=False)
    batches: dict[str, Any] = {"steps": [[full]], "held_out": None}
    real = peak_of(count_real_run(recipe, torch.float32, **batches).peaks, STEP)
    traced = trace_memory(recipe, config, torch.float32, device="cpu", **batches).peak(STEP)[1]
    assert traced.kinds[STATES] == real.kinds[STATES] > 0
    assert traced.total == pytest.approx(real.total, rel=1e-3)
    on_card = trace_memory(recipe, config, torch.float32, device="cuda", **batches).peak(STEP)[1]
    # In steps of 512 bytes: of 21 tensors, six for each at peak_of.
    assert 0 <= on_card.kinds[STATES] - real.kinds[STATES] < 512 * 6 * 21


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_int8_matmuls_are_counted(tiny_recipe: Callable[..., Recipe], device: Device) -> None:
    def operations(quantization: str) -> int:
        found = trace_memory(
            tiny_recipe(quantization={"type": quantization}),
            LlamaConfig(num_hidden_layers=3, **WIDE),
            torch.bfloat16,
            device=device,
            steps=[[full, full]],
            held_out=None,
            kernels="plain",
        )
        return found.flops[STEP]

    full = full_batch(2, 64, padding_free=False)
    assert operations("int8") == pytest.approx(operations("none"), rel=0.02)


def test_expert_matmuls_are_counted(tiny_recipe: Callable[..., Recipe]) -> None:
    def operations(per_token: int) -> int:
        config = Qwen3MoeConfig(
            num_hidden_layers=1, moe_intermediate_size=128, num_experts=8,
            num_experts_per_tok=per_token, **WIDE,
        )  # fmt: skip
        recipe = tiny_recipe(adapter={"target_modules": ["q_proj"]})
        found = trace_memory(
            recipe, config, torch.bfloat16, device="cpu",
            steps=[[full]], held_out=None, kernels="plain",
        )  # fmt: skip
        return found.flops[STEP]

    full = full_batch(1, 64, padding_free=False)
    one, two = operations(1), operations(2)
    # Forward and back (to the input alone): gate, up and down of one more expert for each token.
    assert two - one == 2 * 2 * 64 * 3 * 256 * 128


@pytest.mark.parametrize("checkpointing", mostly_slow([True, "mlp", False], "mlp"))
def test_compiled_kernels_take_less_than_fused_ones(
    tiny_recipe: Callable[..., Recipe], checkpointing: bool | str
) -> None:
    """`benchmarks/plan_validation.md` compares both with the allocator."""
    recipe = tiny_recipe(training={"gradient_checkpointing": checkpointing})
    config = LlamaConfig(num_hidden_layers=3, **WIDE)
    full = full_batch(2, 256, padding_free=True)

    def peak(kernels: Kernels) -> int:
        found = trace_memory(
            recipe, config, torch.bfloat16, device="cpu",
            steps=[[full, full]], held_out=None, kernels=kernels,
        )  # fmt: skip
        return found.peak(STEP)[1].total

    assert peak("compiled") < peak("fused")


@pytest.mark.parametrize("checkpointing", [True, "mlp", False])
def test_the_bytes_of_each_kind_are_those_computed_by_hand(checkpointing: bool | str) -> None:
    """The moment at which the backward pass of the last of two layers begins."""
    tokens, width, inner, vocabulary, layers, rank = 24, 32, 64, 260, 2, 4
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=inner,
        num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        tie_word_embeddings=False,
    )  # fmt: skip
    recipe = Recipe.model_validate(
        {
            "model": {"path": "-"},
            "quantization": {"type": "none"},
            "adapter": {"type": "lora", "r": rank},
            "data": {"train": {"path": "-"}, "max_length": tokens},
            "training": {
                "batch_size": 1,
                "micro_batch_size": 1,
                "gradient_checkpointing": checkpointing,
            },
            "output": {"dir": "-"},
        }
    )
    steps = [[full_batch(1, tokens, padding_free=True)]]
    found = trace_memory(
        recipe, config, torch.float32, device="cpu", steps=steps, held_out=None
    ).peaks
    kinds = found[Segment("step", "backward", 1, 3)].kinds
    # Queries, keys, values and output; gate, up and down. Keys and values have half the heads.
    shapes = [(width, width), (width, width // 2), (width, width // 2), (width, width)]
    shapes += [(width, inner), (width, inner), (inner, width)]
    weights = layers * (sum(a * b for a, b in shapes) + 2 * width) + 2 * vocabulary * width + width
    trained = layers * sum(rank * (a + b) for a, b in shapes)
    frequencies = 2 * width // 4 // 2
    assert kinds[UNQUANTIZED] == 4 * (weights + frequencies)
    assert kinds[ADAPTER] == 4 * trained
    assert kinds[STATES] == 4 * (2 * trained + 2 * layers * len(shapes))  # each counts its steps
    assert kinds[GRADIENTS] == kinds[LOGITS] == 0
    # Numbers per token that each layer keeps.
    kept = width  # its input
    if checkpointing is not True:  # queries and keys, values, output, sums of the heads, ...
        kept += (width + width // 2) + width // 2 + width + 4
        kept += 3 * rank + rank + width + 2  # ... inside of LoRA, the middle, factors of two norms
    if checkpointing is False:  # gate and up, inside of LoRA
        kept += 2 * inner + 3 * rank
    # LoRA's A, and B as a block-diagonal matrix: q, k and v, then o, gate and up, and down.
    factors = (width * (3 + 1 + 2) + inner) * rank
    factors += (2 * width * 3 + width + 2 * inner * 2 + width) * rank
    small = kinds[SAVED] - 4 * layers * (tokens * kept + factors)
    assert 0 <= small < 256  # the ends of documents, and scalars
    logits = found[Segment("step", "forward", 1, 2 * layers)].kinds[LOGITS]
    assert logits == 2 * 4 * (tokens - 1) * vocabulary  # and their gradient
