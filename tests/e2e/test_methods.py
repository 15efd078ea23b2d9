"""Methods beyond LoRA layers: resume, evaluate, merge and generate."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_cli.data.sources import Source
from qlora_cli.errors import ModelError
from qlora_cli.evaluate.evaluate import evaluate
from qlora_cli.export.merge import merge
from qlora_cli.inference.batch import generate
from qlora_cli.inference.sampling import Sampling
from qlora_cli.inference.session import open_session
from qlora_cli.plan.plan import plan
from qlora_cli.recipe.schema import Recipe
from qlora_cli.train.train import train
from tests.conftest import mostly_slow
from tests.e2e.test_exact_resume import check_resumes

METHODS: dict[str, dict[str, Any]] = {
    "pissa": {"type": "lora", "r": 4, "init": "pissa_fast", "dropout": 0.1},
    "olora": {"type": "lora", "r": 4, "init": "olora"},
    "lora-fa": {"type": "lora", "r": 4, "freeze_a": True},
    # Of 6 steps the first keeps all ranks, and the last one changes none.
    "adalora": {"type": "adalora", "r": 4, "target_r": 2, "begin_at": 0.2, "end_at": 0.8},
    "prompt": {"type": "prompt", "num_virtual_tokens": 3},
    "prefix": {"type": "prefix", "num_virtual_tokens": 3},
}


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("method", mostly_slow(METHODS, "adalora"))
def test_every_method_resumes_exactly(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path, method: str, quantization: str
) -> None:
    recipe = tiny_recipe(
        adapter=METHODS[method],
        quantization={"type": quantization},
        training={
            "max_steps": 6,
            "save_every": 1,
            "eval_every": 3,
            "gradient_checkpointing": method in ("prefix", "adalora"),
        },
        output={"dir": str(tmp_path / "run"), "keep_checkpoints": 1000},
    )
    check_resumes(recipe, [2, 4])


@pytest.mark.parametrize("quantization", ["none", "int8"])
@pytest.mark.parametrize("method", mostly_slow(METHODS, "prefix"))
def test_every_method_can_be_evaluated_merged_and_generated_from(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path, method: str, quantization: str
) -> None:
    recipe = tiny_recipe(
        adapter=METHODS[method],
        quantization={"type": quantization},
        training={"max_steps": 10},
        optimizer={"type": "adamw", "learning_rate": 3e-2},
    )
    planned = plan(recipe, device="cpu")
    record = train(recipe)
    assert planned.model.trained == record["trained_weights"]
    # The same loss by another path; int8 rounding depends on the other tokens of a batch.
    run, tolerance = tmp_path / "run", 1e-4 if quantization == "none" else 2e-2
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["eval_loss"] for line in metrics if "eval_loss" in line]
    assert losses[-1] < losses[0]
    report = evaluate(run).to_json()
    assert report["models"]["tuned"]["loss"]["value"] == pytest.approx(losses[-1], rel=tolerance)
    merged = tmp_path / "merged"
    if method in ("prompt", "prefix"):
        with pytest.raises(ModelError, match="virtual tokens are not a weight of the base"):
            merge(run, merged, weights="last")
    else:
        proof = merge(run, merged, weights="last")
        assert proof.kl < 1e-3
    rows = tmp_path / "rows.jsonl"
    answers = tmp_path / "answers.jsonl"
    sampling = Sampling(max_new_tokens=8)
    generated = generate(
        open_session(str(run)),
        Source(path=str(rows)),
        answers,
        sampling=sampling,
        batch_size=4,
    )
    assert generated.prompts == 16
    assert generated.tokens > 0
