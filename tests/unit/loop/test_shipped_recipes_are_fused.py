"""Each recipe in configs/ reaches the fused layers, or the reason is listed here."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_cli.loop.fast_path import ComputeOptions, prepare_layers
from qlora_cli.models.miniature import shrink_config
from qlora_cli.recipe.load import load_recipe

CONFIGS = Path(__file__).parents[3] / "configs"
RECIPES = sorted(CONFIGS.glob("*.yaml"))
NOT_FUSED = {
    "llama-3.1-8b-int8-24gb": "the base is in 8 bit",
    "qwen2.5-0.5b-full-16gb": "the base is held in float32 and computed in bfloat16",
}
"""Recipes whose layers are those of transformers, and why."""


def test_all_recipes_are_asked() -> None:
    assert len(RECIPES) == 8
    assert NOT_FUSED.keys() <= {path.stem for path in RECIPES}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_layers_are_fused_or_the_log_says_why(
    path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "qlora")
    recipe = load_recipe(path, []).recipe
    # The demo's model is a Llama, and may not be here.
    is_demo = path.stem == "quickstart"
    whole = AutoConfig.for_model("llama") if is_demo else recipe.model.read_config()[0]
    config = shrink_config(whole, vocab_size=128, max_layers=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    dtype = recipe.quantization.compute_in(torch.bfloat16)
    tiny = recipe.model.model_copy(update={"path": str(tmp_path)})
    base = tiny.load(recipe.quantization.load_options(dtype), torch.device("cpu"))
    model = recipe.adapter.attach(base)
    found = prepare_layers(model, base, False, ComputeOptions(dtype, "fused"))
    reason = NOT_FUSED.get(path.stem)
    assert found == ("plain" if reason else "fused")
    said = [line for line in caplog.messages if line.startswith("kernels: plain, because")]
    assert said == ([f"kernels: plain, because {reason}"] if reason else [])


def test_layers_with_dropout_are_fused() -> None:
    recipe = load_recipe(CONFIGS / "llama-3.1-8b-lora-24gb.yaml", ["adapter.dropout=0.05"]).recipe
    config = shrink_config(AutoConfig.for_model("llama"), vocab_size=128, max_layers=2)
    base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model = recipe.adapter.attach(base)
    assert prepare_layers(model, base, False, ComputeOptions(torch.bfloat16)) == "fused"
