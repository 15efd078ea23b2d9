"""The runs that are killed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from benchmarks.random_kills.experiment import Form

RECIPES = Path(__file__).resolve().parents[1]
MODEL = RECIPES.parent / "models/smollm2-135m-instruct/SmolLM2-135M-Instruct.Q4_1.gguf"


def tiny_form(folder: Path, kills: int, max_steps: int) -> Form:
    """Make a random model of two layers in NF4, with enough rows to kill their preparation."""
    from tests.conftest import save_tiny_model

    save_tiny_model(folder / "model")
    rows = [
        {"prompt": f"say {word} {count}", "completion": " ".join([word] * count)}
        for word in ("ab", "cd", "ef", "gh")
        for count in (1, 2, 3, 5)
    ]
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows * 1000), encoding="utf-8")
    kind = {"type": "prompt_completion"}
    document = {
        "model": {"path": str(folder / "model")},
        "quantization": {"type": "nf4"},
        "adapter": {"type": "lora", "r": 4, "alpha": 8, "dropout": 0.1},
        "data": {
            "train": {"path": str(data), "format": kind},
            "evaluation": {"path": str(data), "format": kind, "limit": 6},
            "max_length": 96,
        },
        "training": {"batch_size": 4, "micro_batch_size": 2, "gradient_checkpointing": False},
        "optimizer": {"type": "adamw", "learning_rate": 1e-2},
    }
    return as_form("a random model of two layers", document, folder, kills, max_steps, 3)


def gsm8k_form(folder: Path, kills: int, max_steps: int, data: Path, model: Path) -> Form:
    """Make the benchmarks' GSM8K recipe, on the short rows of both splits."""
    document = yaml.safe_load((RECIPES / "gsm8k.yaml").read_text(encoding="utf-8"))
    for split, name, number in (("train", "train", 400), ("evaluation", "test", 4)):
        lines = (data / f"{name}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        short = [line for line in lines if len(line) < 280][:number]
        (folder / f"{name}.jsonl").write_text("".join(short), encoding="utf-8")
        document["data"][split] |= {"path": str(folder / f"{name}.jsonl"), "limit": None}
    document["model"]["path"] = str(model)
    document["adapter"]["dropout"] = 0.1
    document["training"] |= {"epochs": None, "batch_size": 2, "micro_batch_size": 1}
    return as_form(
        f"{model.stem} in NF4 on short rows of GSM8K", document, folder, kills, max_steps, 5
    )


def as_form(
    title: str, document: dict[str, Any], folder: Path, kills: int, max_steps: int, eval_every: int
) -> Form:
    """Write the recipe: a checkpoint every second step, and a log line for every step."""
    save_every = 2
    document["training"] |= {
        "max_steps": max_steps,
        "save_every": save_every,
        "eval_every": eval_every,
        "log_every": 1,
    }
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(document), encoding="utf-8")
    return Form(title, recipe, kills, max_steps, save_every, eval_every)
