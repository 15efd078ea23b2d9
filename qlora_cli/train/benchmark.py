"""Measure speed and memory of a recipe's steps on this machine; leave no files."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from qlora_cli.recipe.schema import Recipe
from qlora_cli.runs.run_folder import environment
from qlora_cli.train.train import train


def bench(recipe: Recipe, *, steps: int) -> dict[str, Any]:
    """Train for some steps and measure them. The first step is a warm-up and does not count.

    Args:
        steps: at least 2.

    Returns:
        {"tokens_per_second": {"median", "least", "most"} (padding does not count),
        "processor_seconds_per_1000_tokens" (of the whole process, start and end included),
        "peak_memory_bytes", "seconds_to_first_step" (reading data and loading included),
        "losses", "kernels", "steps", "threads", "gpus", "packages"}.

    Raises:
        QloraError: as `train` does.
    """
    started, busy = time.monotonic(), time.process_time()
    with tempfile.TemporaryDirectory(prefix="qlora-bench-") as folder:
        run = Path(folder) / "run"
        record = train(_short(recipe, steps, run))
        seconds, busy = time.monotonic() - started, time.process_time() - busy
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if "loss" in row]
    tokens = [row["tokens"] - before for row, before in zip(rows[1:], _tokens(rows), strict=False)]
    speeds = [row["tokens_per_second"] for row in rows[1:]]
    in_steps = sum(number / speed for number, speed in zip(tokens, speeds, strict=True))
    known = environment()
    return {
        "tokens_per_second": {
            "median": median(speeds), "least": min(speeds), "most": max(speeds),
        },
        "processor_seconds_per_1000_tokens": 1000 * busy / rows[-1]["tokens"],
        "peak_memory_bytes": record["peak_memory_bytes"],
        "seconds_to_first_step": seconds - in_steps,
        "losses": [row["loss"] for row in rows],
        "kernels": record["kernels"],
        "steps": steps,
        **{key: known[key] for key in ("threads", "gpus", "packages")},
    }  # fmt: skip


def _tokens(rows: list[dict[str, Any]]) -> list[int]:
    return [row["tokens"] for row in rows]


def _short(recipe: Recipe, steps: int, folder: Path) -> Recipe:
    """Return the recipe with only its first steps: no evaluation, no checkpoints."""
    document = recipe.model_dump(mode="json")
    document["training"] |= {
        "max_steps": steps, "epochs": None, "log_every": 1, "eval_every": None,
        "tasks_every": None, "patience": None, "save_every": None, "stop_after": None,
        "spike": None,
    }  # fmt: skip
    document["data"] |= {"evaluation": None, "evaluation_share": None}
    document["evaluation"] = {}
    document["output"] = {"dir": str(folder)}
    return Recipe.model_validate(document)
