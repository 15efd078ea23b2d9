"""Collect the files of a comparison into one report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from qlora_cli.compare.grid import Cell
from qlora_cli.compare.store import ResultStore
from qlora_cli.evaluate.bootstrap import CONFIDENCE, RESAMPLES, value_columns
from qlora_cli.evaluate.evaluate import choose_tasks
from qlora_cli.evaluate.report import summarize
from qlora_cli.runs.run_folder import environment
from qlora_cli.tasks.task import Measure, Task, TaskOutcomes

CellReport = dict[str, Any]


@dataclass(frozen=True)
class ReferenceCell:
    """The first evaluated cell, with which the others are compared."""

    name: str
    tasks: Sequence[Task]
    answers: TaskOutcomes


def make_report(cells: Sequence[Cell], root: Path) -> dict[str, Any]:
    """Report what a comparison has so far.

    Returns:
        {"folder", "first": name of the cell with which the others are compared, "varied": [key],
        "measures": {measure: {"n", "is_share", "lower_is_better"}}, "bases": {name: {measure: E}}
        (the untrained model, as cells quantize it), "confidence", "resamples", "environment",
        "cells": [C]}; C is {"name", "recipe", "method", "settings", "status"
        ("finished", "failed", "pruned" or "waiting"), "failure": {"error", "hint"} or null, "run",
        "trained_weights", "total_weights", "trained_share", "steps", "tokens", "seconds",
        "tokens_per_second", "weights_bytes", "run_bytes", "memory", "generation", "results",
        "differences" (from the first cell), "base" (its name in "bases"), "from_base" (the
        difference from it), "curve": [{"step", "tokens", "seconds", "loss"}]}. Unknown values are
        null.
    """
    first = _reference_cell(cells, root)
    shared: dict[str, Any] = {"measures": {}, "bases": {}}
    rows = [_row(cell, ResultStore(root, cell), first, shared) for cell in cells]
    return {
        "folder": str(root),
        "first": first and first.name,
        "varied": list(dict.fromkeys(key for cell in cells for key in cell.settings)),
        **shared,
        "confidence": CONFIDENCE,
        "resamples": RESAMPLES,
        "environment": environment(),
        "cells": rows,
    }


def value_of(cell: Cell, store: ResultStore, name: str) -> float | None:
    """Return one measure of a cell; None before the cell was evaluated."""
    answers = store.answers()
    if answers is None or cell.recipe is None:
        return None
    task, measure = find_measure(choose_tasks(cell.recipe, None, is_tuned=True), name)
    return float(measure.aggregate(value_columns(answers[task.label])))


def find_measure(tasks: Sequence[Task], name: str) -> tuple[Task, Measure]:
    """Find a measure by name, and its task.

    Raises:
        KeyError: there is no such measure.
    """
    named = {known: (task, one) for task in tasks for known, one in task.named_measures()}
    return named[name]


def _reference_cell(cells: Sequence[Cell], root: Path) -> ReferenceCell | None:
    for cell in cells:
        answers = ResultStore(root, cell).answers()
        if cell.recipe is not None and answers is not None:
            return ReferenceCell(cell.name, choose_tasks(cell.recipe, None, is_tuned=True), answers)
    return None


def _row(
    cell: Cell, store: ResultStore, first: ReferenceCell | None, shared: dict[str, Any]
) -> CellReport:
    record, measurements = store.record(), store.measurements() or {}
    curve = loss_curve(store.metrics())
    trained, total = record.get("trained_weights"), record.get("total_weights")
    return {
        "name": cell.name,
        "recipe": cell.recipe_name,
        "method": cell.method,
        "settings": dict(cell.settings),
        **_status(cell, store),
        "run": str(store.run.root) if record else None,
        "trained_weights": trained,
        "total_weights": total,
        "trained_share": trained / total if trained and total else None,
        **{key: record.get(key) for key in ("steps", "tokens", "seconds")},
        "tokens_per_second": training_speed(store.metrics()),
        **{key: measurements.get(key) for key in ("weights_bytes", "run_bytes")},
        "memory": _memory(record, measurements.get("plan")),
        "generation": measurements.get("generation"),
        **_results(cell, store, first, shared),
        "curve": curve,
    }


def _status(cell: Cell, store: ResultStore) -> CellReport:
    if cell.recipe is None:
        return {"status": "failed", "failure": {"error": cell.error, "hint": None}}
    failure = store.failure()
    if failure is None:
        return {"status": "finished" if store.is_done else "waiting", "failure": None}
    shared = {key: failure[key] for key in ("error", "hint")}
    return {"status": "pruned" if failure.get("is_pruned") else "failed", "failure": shared}


def _memory(record: CellReport, plan: CellReport | None) -> CellReport:
    """Return memory in bytes: planned (tensors by kind, process) and measured (process)."""
    planned = {key: (plan or {}).get(key) for key in ("tensor_bytes", "process_bytes", "kinds")}
    return {
        **{f"planned_{key}": value for key, value in planned.items()},
        "plan_error": (plan or {}).get("error"),
        "measured_bytes": record.get("peak_memory_bytes"),
        "measured_tensor_bytes": record.get("tried_memory_bytes"),
    }


def _results(
    cell: Cell, store: ResultStore, first: ReferenceCell | None, shared: dict[str, Any]
) -> CellReport:
    """Estimate the measures, and paired differences from the first cell and from the base.

    Args:
        shared: receives what is not specific to this cell.
    """
    answers, base = store.answers(), store.answers(of_base=True) if store.has_base else None
    found: CellReport = dict.fromkeys(("results", "differences", "base", "from_base"))
    if answers is None or first is None:
        return found
    against_first = summarize(first.tasks, {"first": first.answers, "this": answers}).to_json()
    shared["measures"] |= against_first["measures"]
    found["results"] = against_first["models"]["this"]
    if cell.name != first.name:
        found["differences"] = against_first["differences"]
    if base is not None:
        against_base = summarize(first.tasks, {"base": base, "this": answers}).to_json()
        shared["bases"][store.base_name] = against_base["models"]["base"]
        found |= {"base": store.base_name, "from_base": against_base["differences"]}
    return found


def training_speed(metrics: Sequence[CellReport]) -> float | None:
    """Compute tokens per second: the median of the logged values without the first (warm-up)."""
    speeds = [row["tokens_per_second"] for row in metrics if "loss" in row]
    return median(speeds[1:] or speeds) if speeds else None


def loss_curve(metrics: Sequence[CellReport]) -> list[CellReport]:
    """Return the logged losses by tokens and by seconds of training, evaluation not counted."""
    curve: list[CellReport] = []
    tokens, seconds = 0, 0.0
    for row in metrics:
        # A loss that is not finite is null in the file.
        if row.get("loss") is None or not row["tokens_per_second"]:
            continue
        seconds += (row["tokens"] - tokens) / row["tokens_per_second"]
        tokens = row["tokens"]
        curve.append(
            {"step": row["step"], "tokens": tokens, "seconds": seconds, "loss": row["loss"]}
        )
    return curve
