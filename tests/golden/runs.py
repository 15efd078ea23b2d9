"""Short runs with kept losses, one for each kind of recipe."""

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
    "qlora-nf4-wide": {"quantization": {"type": "nf4"}},
    "qlora-fp4-wide": {"quantization": {"type": "fp4", "double_quant": False}},
}

WIDE = {"hidden_size": 64, "intermediate_size": 128}
"""Rows of whole blocks of 64, the block size of the 4-bit types."""
DEPEND_ON_KERNEL = ("qlora-nf4", "qlora-fp4")
"""Kinds that are compared between commits on one machine, and whose losses are not kept.

Their rows of 32 are shorter than a block. bitsandbytes' kernels for AVX-512 and for AVX2 dequantize
such rows to different values (1 % of the first loss apart; those of AVX2 are the nearest codes). No
model that people train has such rows.
"""
KEPT_KINDS = [kind for kind in KINDS if kind not in DEPEND_ON_KERNEL]


def losses(kind: str, folder: Path) -> list[float]:
    """Train a tiny model for five steps in float32, and return the losses."""
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
    width = WIDE if kind.endswith("-wide") else {}
    recipe = Recipe.model_validate(
        {
            "model": {"path": str(save_tiny_model(folder / "model", **width))},
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
