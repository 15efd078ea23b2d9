"""The short runs whose losses are kept: one for each kind of recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qlora_cli.recipe.schema import Recipe
from qlora_cli.train.train import train
from tests.conftest import save_tiny_model

KEPT = Path(__file__).with_name("losses.json")

KINDS: dict[str, dict[str, Any]] = {
    "lora": {"quantization": {"type": "none"}},
    "qlora-nf4": {"quantization": {"type": "nf4"}},
    "qlora-fp4": {"quantization": {"type": "fp4", "double_quant": False}},
    "int8": {"quantization": {"type": "int8"}},
    "dora": {"adapter": {"type": "lora", "r": 4, "use_dora": True}},
    "full": {"adapter": {"type": "full"}, "optimizer": {"type": "adamw", "learning_rate": 1e-3}},
    "cosine-dropout": {
        "adapter": {"type": "lora", "r": 4, "dropout": 0.1},
        "schedule": {"type": "cosine", "warmup_steps": 2},
    },
}


def losses(kind: str, folder: Path) -> list[float]:
    """Training losses of five steps on a tiny model, in float32."""
    rows = folder / "rows.jsonl"
    rows.write_text(
        "".join(
            json.dumps({"prompt": f"say {word} {count}", "completion": " ".join([word] * count)})
            + "\n"
            for word in ("ab", "cd", "ef", "gh")
            for count in (1, 2, 3, 5)
        ),
        encoding="utf-8",
    )
    recipe = Recipe.model_validate(
        {
            "model": {"path": str(save_tiny_model(folder / "model"))},
            "adapter": {"type": "lora", "r": 4},
            "data": {
                "train": {"path": str(rows), "format": {"type": "prompt_completion"}},
                "max_length": 96,
            },
            "training": {
                "max_steps": 5,
                "batch_size": 4,
                "micro_batch_size": 2,
                "precision": "fp32",
                "gradient_checkpointing": False,
            },
            "optimizer": {"type": "adamw", "learning_rate": 1e-2},
            "output": {"dir": str(folder / "run")},
            **KINDS[kind],
        }
    )
    train(recipe)
    lines = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row["loss"] for row in map(json.loads, lines) if "loss" in row]
