"""Repeat a run from its record, and compare the results bit for bit."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, get_args

from qlora_cli._compat import quiet_libraries
from qlora_cli.common.atomic_files import describe_file
from qlora_cli.distributed.world import World
from qlora_cli.errors import RecipeError
from qlora_cli.loop.run_data import read_recipe_data
from qlora_cli.models.identity import identify
from qlora_cli.recipe.schema import Recipe
from qlora_cli.runs.resume_check import (
    Changes,
    compare,
    compare_environments,
    compare_fingerprints,
    recorded_recipe,
    take_fingerprint,
)
from qlora_cli.runs.run_folder import RunFolder, Weights
from qlora_cli.train.train import train

log = logging.getLogger("qlora")

_CLOCKS = ("tokens_per_second", "peak_memory_bytes")
"""Metrics that depend on the machine and its load."""


def rerun(path: Path, output: Path | None = None) -> dict[str, Any]:
    """Train again as a run was trained, and compare weights and metrics bit for bit.

    Args:
        path: folder of the run; only read.
        output: folder of the new run; None makes `NAME-again` next to the other.

    Returns:
        {"run", "again", "is_same", "different": {name: [old, new]}, "weights": {"last" or "best":
        W}, "metrics": M}: `different` lists what had changed before training began; W is
        {"is_same", "largest_difference"} (null if the tensors cannot be compared); M is
        {"is_same", "rows", "first": null or {"step", name: [old, new]}}.

    Raises:
        RecipeError: the run has not finished, or `output` is taken.
        ModelError: the weights of the run are damaged.
        QloraError: training fails.
    """
    quiet_libraries()
    run = RunFolder(path)
    record = run.read_record()
    if record.get("status") != "finished":
        raise RecipeError(
            f"{path}: the run has not finished, so it has no result to compare with",
            hint=run.ways_to_finish(),
        )
    for name in get_args(Weights):
        if (run.root / name).is_dir():
            run.weights(name)  # a damaged file would be taken for another result
    again = RunFolder(output or path.absolute().with_name(f"{path.absolute().name}-again"))
    recipe = _elsewhere(recorded_recipe(run), again.root)
    again.start(resume=False)
    different = _find_different(record, recipe)
    train(recipe)
    return _compare_results(run, again, different)


def _elsewhere(recipe: Recipe, folder: Path) -> Recipe:
    """Return the recipe with another output folder, and without its deadline."""
    document = recipe.model_dump(mode="json")
    document["output"]["dir"] = str(folder)
    document["training"]["stop_after"] = None
    return Recipe.model_validate(document)


def _find_different(record: dict[str, Any], recipe: Recipe) -> Changes:
    """Find and log what differs from the record: it explains a different result."""
    data = read_recipe_data(recipe)
    base = identify(recipe.model.locate())
    now = take_fingerprint(base, data.tokenizer, data.training, data.evaluation)
    different = {
        **compare_environments(record),
        **compare({"processes": record["processes"]}, {"processes": World(recipe.device).size}),
        **compare_fingerprints(record, now),
    }
    for resumed in record.get("resumed", []):
        for key, pair in resumed["changes"].items():
            different[f"{key}, since step {resumed['step']} of the first run"] = pair
    for name, (old, new) in different.items():
        log.warning("changed: %s: %s -> %s", name, old, new)
    if not different:
        log.info("versions, hardware, base model and rows are unchanged")
    return different


def _compare_results(run: RunFolder, again: RunFolder, different: Changes) -> dict[str, Any]:
    weights = {
        name: _compare_weights(run.root / name, again.root / name)
        for name in get_args(Weights)
        if (run.root / name).is_dir()
    }
    metrics = _compare_metrics(_metrics(run), _metrics(again))
    return {
        "run": str(run.root),
        "again": str(again.root),
        "is_same": metrics["is_same"] and all(one["is_same"] for one in weights.values()),
        "different": different,
        "weights": weights,
        "metrics": metrics,
    }


def _compare_weights(folder: Path, other: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    names = [sorted(file.name for file in one.glob("*.safetensors")) for one in (folder, other)]
    if names[0] != names[1]:
        return {"is_same": False, "largest_difference": None}
    if all(describe_file(folder / name) == describe_file(other / name) for name in names[0]):
        return {"is_same": True, "largest_difference": 0.0}
    largest = 0.0
    for name in names[0]:
        mine, theirs = load_file(folder / name), load_file(other / name)
        if {k: v.shape for k, v in mine.items()} != {k: v.shape for k, v in theirs.items()}:
            return {"is_same": False, "largest_difference": None}
        apart = [float((mine[k].double() - theirs[k].double()).abs().max()) for k in mine]
        largest = max(largest, *apart)
    return {"is_same": False, "largest_difference": largest}


def _compare_metrics(rows: list[dict[str, Any]], others: list[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {"is_same": rows == others, "rows": len(rows), "first": None}
    for row, other in zip(rows, others, strict=False):
        if row != other:
            found["first"] = {**compare(row, other), "step": row["step"]}
            break
    return found


def _metrics(run: RunFolder) -> list[dict[str, Any]]:
    lines = (run.root / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = map(json.loads, lines)
    return [{k: v for k, v in row.items() if k not in _CLOCKS} for row in rows]
