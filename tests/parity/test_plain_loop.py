"""Our loop against one that anybody would write with transformers, PEFT and torch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qlora_cli.data.batching.sampler import BatchStream
from qlora_cli.data.prepared.cache import read_data
from qlora_cli.export.merge import merge
from qlora_cli.train.train import train
from qlora_cli.types import Batch
from tests.conftest import save_tiny_model

STEPS = 10


def plain_training(
    folder: Path, batches: list[list[Batch]], **changes: Any
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Ten steps, each on one batch of the whole step, padded, through the model's own logits."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(0)
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", **changes
    )
    # Drawn in float32, as ours are; then in float64, so that what differs is our rounding alone.
    model = get_peft_model(model, config).train().double()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    losses = []
    for (batch,) in batches:
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=-100
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}


def logged_losses(run: Path) -> list[float]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row["loss"] for row in map(json.loads, lines) if "loss" in row]


@pytest.mark.parametrize(
    "settings",
    [
        {"micro_batch_size": 4},
        {"micro_batch_size": 1},
        {"micro_batch_size": 2, "gradient_checkpointing": True},
    ],
    ids=["4x1", "1x4", "2x2-checkpointed"],
)
def test_ten_steps_equal_the_plain_loop(
    tiny_recipe: Callable[..., Any], tiny_model: Path, settings: dict[str, Any]
) -> None:
    recipe = tiny_recipe(
        training={"max_steps": STEPS, **settings},
        optimizer={"weight_decay": 0.01},
        schedule={"type": "linear"},
    )
    run, losses, weights = train_both(recipe, tiny_model)

    # Float32 sums in another order; ten steps of AdamW let it grow a little.
    assert logged_losses(run) == pytest.approx(losses, abs=1e-6)
    saved = load_file(run / "last" / "adapter_model.safetensors")
    assert len(saved) == len(weights) == 28
    for name, weight in weights.items():
        ours = saved[name.replace(".default", "")].double()
        torch.testing.assert_close(ours, weight, rtol=0, atol=1e-6)


@pytest.mark.quick_every(3)
@pytest.mark.parametrize("indices", [[256, 257], [0], [259, 3, 100]], ids=str)
def test_trained_token_rows_of_a_tied_model_equal_the_plain_loop(
    tiny_recipe: Callable[..., Any], tmp_path: Path, indices: list[int]
) -> None:
    base = save_tiny_model(tmp_path / "tied", tie_word_embeddings=True)
    recipe = tiny_recipe(
        model={"path": str(base)},
        adapter={"type": "lora", "r": 4, "alpha": 8, "trainable_token_indices": indices},
        training={"max_steps": STEPS},
        optimizer={"weight_decay": 0.01},
        schedule={"type": "linear"},
    )
    run, losses, weights = train_both(recipe, base, trainable_token_indices=indices)
    assert logged_losses(run) == pytest.approx(losses, abs=1e-6)

    report = merge(run, tmp_path / "merged", weights="last")
    assert report.logit_error < 1e-5
    before = load_file(base / "model.safetensors")
    after = load_file(tmp_path / "merged/model.safetensors")
    assert after.keys() == before.keys()  # the head is still the embedding
    [rows] = [w for name, w in weights.items() if "trainable_tokens_delta" in name]
    expected = before["model.embed_tokens.weight"].double()
    expected[indices] = rows
    found = after["model.embed_tokens.weight"].double()
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def train_both(
    recipe: Any, base: Path, **changes: Any
) -> tuple[Path, list[float], dict[str, torch.Tensor]]:
    """Train a recipe, and its batches with the plain loop."""
    train(recipe)
    tokenizer = recipe.model.load_tokenizer()
    examples = read_data("training", recipe.data, recipe.data.train_sources, tokenizer).examples
    stream = BatchStream(
        examples,
        batch_size=4,
        micro_batch_size=4,
        seed=0,
        epochs=None,
        pad_token_id=tokenizer.pad_token_id,
    )
    batches = [stream.micro_batches(i) for i in range(STEPS)]
    return Path(recipe.output.dir), *plain_training(base, batches, **changes)
