"""Test that tracing few layers predicts a model of many."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    Gemma2Config,
    LlamaConfig,
    PretrainedConfig,
    Qwen3Config,
)

from qlora_cli.data.batching.collate import full_batch
from qlora_cli.plan.dry_run import EVALUATION, FIRST, STEP
from qlora_cli.plan.traced_memory import MemoryTrace, trace_memory
from qlora_cli.recipe.schema import Recipe
from tests.unit.plan.tiny import LAYERS

LLAMA = LlamaConfig(num_hidden_layers=6, **LAYERS)
# Every other layer is a local one, and nine is odd.
GEMMA = Gemma2Config(num_hidden_layers=9, sliding_window=16, **LAYERS)
QWEN = Qwen3Config(num_hidden_layers=5, **LAYERS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "checkpointing"),
    [
        (LLAMA, True),
        (GEMMA, True),
        (QWEN, False),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in ((LLAMA, False), (GEMMA, False), (QWEN, True))
        ),
    ],
    ids=lambda value: getattr(value, "model_type", str(value)),
)
def test_a_trace_of_few_layers_predicts_many_layers(
    tiny_recipe: Callable[..., Recipe],
    config: PretrainedConfig,
    checkpointing: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = tiny_recipe(
        quantization={"type": "nf4"}, training={"gradient_checkpointing": checkpointing}
    )
    full = full_batch(2, 40, padding_free=False)
    batches: dict[str, Any] = {"steps": [[full, full]], "held_out": full}

    def traced() -> MemoryTrace:
        return trace_memory(recipe, config, torch.bfloat16, device="cpu", **batches)

    few = traced()
    monkeypatch.setattr("qlora_cli.plan.traced_memory._period", lambda _: None)
    whole = traced()
    assert sum(few.traced_layers) < sum(whole.traced_layers) * 2
    assert len(few.traced_layers) == 2
    assert few.traced_layers[1] < config.num_hidden_layers == whole.traced_layers[0]
    for stage in ("load", FIRST, STEP, EVALUATION):
        assert few.peak(stage)[0] == whole.peak(stage)[0]
        assert few.peak(stage)[1].total == whole.peak(stage)[1].total
    assert few.flops == whole.flops
    assert few.trained_weights == whole.trained_weights


PEFTS_OWN = {"r": 4, "layers_to_transform": [8]}


@pytest.mark.quick_every(3)
@pytest.mark.parametrize(
    "sections",
    [
        {"adapter": {"rank_pattern": {"layers.3.self_attn.q_proj": 32}}},
        {"optimizer": {"groups": [{"match": r"layers\.8\.", "learning_rate": 1e-3}]}},
        {"adapter": {"layers_to_transform": [6, 7]}},
        {"adapter": {"type": "freeze", "last_layers": 3}},
        {"adapter": {"type": "freeze", "last_layers": 0, "patterns": [r"layers\.8\."]}},
        {"adapter": {"type": "peft", "peft_type": "miss", "config": PEFTS_OWN}},
    ],
    ids=["ranks", "groups", "layers", "last layers", "patterns", "PEFT's own"],
)
def test_recipe_that_names_layers_is_traced_whole(
    tiny_recipe: Callable[..., Recipe], sections: dict[str, Any]
) -> None:
    recipe = tiny_recipe(**sections)
    full = full_batch(1, 16, padding_free=False)
    found = trace_memory(
        recipe,
        LlamaConfig(num_hidden_layers=9, **LAYERS),
        torch.float32,
        device="cpu",
        steps=[[full]],
        held_out=None,
    )
    assert found.traced_layers == (9,)
