"""Tiny recipes and models for tests of plans, and their real memory."""

from __future__ import annotations

import gc
from typing import Any

import torch

from qlora_cli.data.batching.collate import full_batch
from qlora_cli.loop.fast_path import ComputeOptions
from qlora_cli.plan.dry_run import dry_run
from qlora_cli.plan.trace.libraries import collect_new_garbage_only, load_libraries
from qlora_cli.plan.trace.memory_counter import (
    MemoryCounter,
)
from qlora_cli.plan.trace.meta_model import count_model
from qlora_cli.recipe.schema import Recipe
from qlora_cli.types import Batch

CPU = torch.device("cpu")


RECIPES: dict[str, dict[str, Any]] = {
    "nf4": {"quantization": {"type": "nf4"}},
    "nf4 checkpointed, 8-bit states": {
        "quantization": {"type": "nf4", "double_quant": False},
        "training": {"gradient_checkpointing": True, "micro_batch_size": 2},
        "optimizer": {"type": "adamw_8bit"},
    },
    "int8": {"quantization": {"type": "int8"}},
    "packed": {"quantization": {"type": "nf4"}, "data": {"packing": True}},
    "dora": {"adapter": {"use_dora": True, "dropout": 0.1}},
    "full": {"adapter": {"type": "full"}, "training": {"gradient_checkpointing": True}},
    "freeze": {"adapter": {"type": "freeze", "last_layers": 1, "patterns": ["norm"]}},
    "ia3": {"adapter": {"type": "ia3"}},
    "vera": {"adapter": {"type": "vera", "r": 8}},
    "loha": {"adapter": {"type": "loha", "r": 4}},
    "oft": {"adapter": {"type": "oft", "oft_block_size": 8}, "quantization": {"type": "nf4"}},
    "pissa": {"adapter": {"r": 4, "init": "pissa"}, "quantization": {"type": "nf4"}},
    "adalora": {"adapter": {"type": "adalora", "r": 4, "target_r": 2}},
    "prompt": {"adapter": {"type": "prompt"}, "training": {"gradient_checkpointing": True}},
    "prefix": {"adapter": {"type": "prefix"}, "quantization": {"type": "nf4"}},
    "bottleneck": {
        "adapter": {"type": "bottleneck", "size": 8},
        "quantization": {"type": "nf4"},
        "training": {"gradient_checkpointing": True},
    },
    "dpo": {"objective": {"type": "dpo"}, "quantization": {"type": "nf4"}},
    "dpo, packed": {"objective": {"type": "dpo"}, "data": {"packing": True}},
    "dpo, full": {"objective": {"type": "dpo"}, "adapter": {"type": "full"}},
    "simpo": {"objective": {"type": "simpo"}},
    "kto": {"objective": {"type": "kto"}, "data": {"packing": True}},
}


def full_batch_of(recipe: Recipe, max_length: int, *, padding_free: bool) -> Batch:
    """Return the largest batch of two rows of the kind that the objective learns from."""
    objective = recipe.objective
    return full_batch(
        2,
        max_length,
        padding_free=padding_free,
        link=objective.link_size,
        values=objective.example_values,
    )


LAYERS = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "head_dim": 8,
}


# Wide enough that activations are peak_of of it, as in models that anybody trains.
WIDE = {**LAYERS, "hidden_size": 256, "intermediate_size": 688, "head_dim": 64, "vocab_size": 4000}


# As their makers state them (safetensors' index, or the model card).
WEIGHTS = {
    "huggyllama/llama-65b": 65_285_660_672,
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "meta-llama/Llama-2-70b-hf": 68_976_648_192,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-405B": 405_853_388_800,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "HuggingFaceTB/SmolLM2-135M": 134_515_008,
    "HuggingFaceTB/SmolLM3-3B": 3_075_098_624,
    "mistralai/Mistral-7B-v0.3": 7_248_023_552,
    "mistralai/Mistral-Nemo-2407": 12_247_782_400,
    "mistralai/Mixtral-8x7B-v0.1": 46_702_792_704,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-30B-A3B": 30_532_122_624,
    "google/gemma-2-9b": 9_241_705_984,
    "google/gemma-3-1b": 999_885_952,
    "microsoft/phi-2": 2_779_683_840,
    "microsoft/phi-4": 14_659_507_200,
    "openai/gpt-oss-20b": 20_914_757_184,
}


def count_real_run(recipe: Recipe, dtype: torch.dtype, **batches: Any) -> MemoryCounter:
    """Count the memory of the same steps on real tensors."""
    load_libraries()
    gc.collect()
    base = recipe.model.load(recipe.quantization.load_options(dtype), CPU)
    count = MemoryCounter(vocabulary_size=base.config.vocab_size)
    count_model(base, count)
    with collect_new_garbage_only(), count:
        dry_run(base, recipe, count, ComputeOptions(dtype), **batches)
    return count


def peak_of(peaks: Any, stage: str) -> Any:
    """Find the largest peak of a stage."""
    return max((p for s, p in peaks.items() if s.stage == stage), key=lambda p: p.total)
