"""The backward pass of a fused layer holds few wide tensors at once; the bytes are counted by hand.

T tokens, D wide, I intermediate; two bytes a value.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from qlora_cli.data.batching.collate import full_batch
from qlora_cli.kernels.selection import Kernels
from qlora_cli.plan.dry_run import STEP
from qlora_cli.plan.trace.memory_counter import WORKSPACE
from qlora_cli.plan.traced_memory import trace_memory
from qlora_cli.recipe.schema import Recipe
from tests.unit.plan.tiny import LAYERS

BLOCK = 2**22
"""Values that a card computes at a time."""


def workspace(recipe: Recipe, config: LlamaConfig, batch: Any, kernels: Kernels = "fused") -> int:
    """Return the temporary bytes at the peak of a step on a card."""
    found = trace_memory(
        recipe, config, torch.bfloat16,
        device="cuda", steps=[[batch]], held_out=None, kernels=kernels,
    )  # fmt: skip
    return found.peak(STEP)[1].kinds[WORKSPACE]


@pytest.mark.parametrize("checkpointing", [True, "mlp"])
@pytest.mark.parametrize("kernels", ["fused", "compiled"])
def test_swiglu_backward_holds_its_arguments_and_a_block(
    tiny_recipe: Callable[..., Recipe], kernels: Kernels, checkpointing: bool | str
) -> None:
    recipe = tiny_recipe(training={"gradient_checkpointing": checkpointing})
    config = LlamaConfig(num_hidden_layers=2, **{**LAYERS, "intermediate_size": 4096})
    batch = full_batch(4, 2048, padding_free=True)
    wide = batch.input_ids.numel() * 4096  # T * I
    arguments = 2 * 2 * wide + 2 * wide  # gate and up, and the gradient of their product
    # In float32: gate, up, the gradient, the sigmoid, the gate's activation and its gradient, and
    # the product; in 16 bit: both halves, their concatenation (two wide), and the product.
    block = 7 * 4 * BLOCK + 5 * 2 * BLOCK
    expected = arguments + block if kernels == "fused" else 2 * arguments
    # All that is D wide, and the low-rank factors.
    assert expected <= workspace(recipe, config, batch, kernels) <= 1.05 * expected


@pytest.mark.parametrize(
    ("inner", "copies"),
    [
        (4096, 2),  # gate and up at once
        # Their blocks of statistics end within them: both in one, and the one dequantized last.
        (4104, 3),
    ],
)
def test_few_dequantized_weights_are_held_at_once(
    tiny_recipe: Callable[..., Recipe], inner: int, copies: int
) -> None:
    recipe = tiny_recipe(
        quantization={"type": "nf4", "double_quant": True},
        training={"gradient_checkpointing": True, "kernels": "fused"},
    )
    sizes = {"hidden_size": 1024, "intermediate_size": inner, "head_dim": 128}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8}
    config = LlamaConfig(num_hidden_layers=2, **{**LAYERS, **sizes, **heads})
    expected = copies * 2 * inner * 1024  # I * D
    found = workspace(recipe, config, full_batch(1, 64, padding_free=True))
    assert expected <= found <= 1.2 * expected
