"""Collect the files of a comparison into one report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

from qlora_cli.compare.grid import Cell
from qlora_cli.compare.report import (
    CellFailure,
    CellGeneration,
    CellMemory,
    CellReport,
    CompareReport,
    Latency,
    LossPoint,
    Status,
)
from qlora_cli.compare.store import ResultStore
from qlora_cli.evaluate.bootstrap import CONFIDENCE, RESAMPLES, Estimate, value_columns
from qlora_cli.evaluate.evaluate import choose_tasks
from qlora_cli.evaluate.report import MeasureInfo, summarize
from qlora_cli.runs.run_folder import environment
from qlora_cli.tasks.task import Measure, Task, TaskOutcomes

Record = Mapping[str, Any]
Estimates = Mapping[str, Estimate]


@dataclass(frozen=True)
class ReferenceCell:
    """The first evaluated cell, with which the others are compared."""

    name: str
    answers: TaskOutcomes


@dataclass(frozen=True)
class CellResults:
    """Measures of a cell; None where it has not been evaluated."""

    results: Estimates | None = None
    differences: Estimates | None = None
    base: str | None = None
    from_base: Estimates | None = None
    measures: Mapping[str, MeasureInfo] = field(default_factory=dict)
    of_base: Estimates = field(default_factory=dict)
    """Measures of the base."""


def make_report(cells: Sequence[Cell], root: Path) -> CompareReport:
    """Report what a comparison has so far."""
    first = _reference_cell(cells, root)
    measures: dict[str, MeasureInfo] = {}
    bases: dict[str, Estimates] = {}
    rows = []
    for cell in cells:
        store = ResultStore(root, cell)
        found = _results(cell, store, first)
        measures |= found.measures
        if found.base is not None:
            bases[found.base] = found.of_base
        rows.append(_row(cell, store, found))
    return CompareReport(
        folder=str(root),
        first=first.name if first else None,
        varied=list(dict.fromkeys(key for cell in cells for key in cell.settings)),
        measures=measures,
        bases=bases,
        confidence=CONFIDENCE,
        resamples=RESAMPLES,
        environment=environment(),
        cells=rows,
    )


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
        KeyError: the measure is unknown.
    """
    named = {known: (task, one) for task in tasks for known, one in task.named_measures()}
    return named[name]


def _reference_cell(cells: Sequence[Cell], root: Path) -> ReferenceCell | None:
    for cell in cells:
        answers = ResultStore(root, cell).answers()
        if cell.recipe is not None and answers is not None:
            return ReferenceCell(cell.name, answers)
    return None


def _row(cell: Cell, store: ResultStore, found: CellResults) -> CellReport:
    record, measurements = store.record(), store.measurements() or {}
    metrics = store.metrics()
    status, failure = _status(cell, store)
    trained, total = record.get("trained_weights"), record.get("total_weights")
    return CellReport(
        name=cell.name,
        recipe=cell.recipe_name,
        method=cell.method,
        settings=dict(cell.settings),
        status=status,
        failure=failure,
        run=str(store.run.root) if record else None,
        trained_weights=trained,
        total_weights=total,
        trained_share=trained / total if trained and total else None,
        steps=record.get("steps"),
        tokens=record.get("tokens"),
        seconds=record.get("seconds"),
        tokens_per_second=training_speed(metrics),
        weights_bytes=measurements.get("weights_bytes"),
        run_bytes=measurements.get("run_bytes"),
        memory=_memory(record, measurements.get("plan") or {}),
        generation=_generation(measurements.get("generation")),
        results=found.results,
        differences=found.differences,
        base=found.base,
        from_base=found.from_base,
        curve=loss_curve(metrics),
    )


def _status(cell: Cell, store: ResultStore) -> tuple[Status, CellFailure | None]:
    if cell.recipe is None:
        assert cell.error is not None
        return "failed", CellFailure(cell.error, None)
    failure = store.failure()
    if failure is None:
        return "finished" if store.is_done else "waiting", None
    reason = CellFailure(failure["error"], failure["hint"])
    return "pruned" if failure.get("is_pruned") else "failed", reason


def _memory(record: Record, plan: Record) -> CellMemory:
    return CellMemory(
        planned_tensor_bytes=plan.get("tensor_bytes"),
        planned_process_bytes=plan.get("process_bytes"),
        planned_kinds=plan.get("kinds"),
        plan_error=plan.get("error"),
        measured_bytes=record.get("peak_memory_bytes"),
        measured_tensor_bytes=record.get("tried_memory_bytes"),
    )


def _generation(speeds: Record | None) -> CellGeneration | None:
    if speeds is None:
        return None
    return CellGeneration(**{model: Latency(**speed) for model, speed in speeds.items()})


def _results(cell: Cell, store: ResultStore, first: ReferenceCell | None) -> CellResults:
    """Estimate the measures, and paired differences from the first cell and from the base."""
    answers, base = store.answers(), store.answers(of_base=True) if store.has_base else None
    if answers is None or first is None or cell.recipe is None:
        return CellResults()
    tasks = choose_tasks(cell.recipe, None, is_tuned=True)
    if _are_alike(first.answers, answers):
        against_first = summarize(tasks, {"first": first.answers, "this": answers})
    else:  # another objective measures something else
        against_first = summarize(tasks, {"this": answers})
    found = CellResults(
        results=against_first.models["this"],
        differences=against_first.differences if cell.name != first.name else None,
        measures=against_first.measures,
    )
    if base is None or not _are_alike(base, answers):
        return found
    against_base = summarize(tasks, {"base": base, "this": answers})
    return replace(
        found,
        base=store.base_name,
        from_base=against_base.differences,
        of_base=against_base.models["base"],
    )


def _are_alike(first: TaskOutcomes, second: TaskOutcomes) -> bool:
    """Tell if two models were measured by the same values."""
    names = [
        {label: set(outcomes[0].values) for label, outcomes in one.items()}
        for one in (first, second)
    ]
    return names[0] == names[1]


def training_speed(metrics: Sequence[Record]) -> float | None:
    """Compute tokens per second: the median of the logged values without the first (warm-up)."""
    speeds = [row["tokens_per_second"] for row in metrics if "loss" in row]
    return median(speeds[1:] or speeds) if speeds else None


def loss_curve(metrics: Sequence[Record]) -> list[LossPoint]:
    """Return the logged losses by tokens and by seconds of training, evaluation not counted."""
    curve: list[LossPoint] = []
    tokens, seconds = 0, 0.0
    for row in metrics:
        # A loss that is not finite is null in the file.
        if row.get("loss") is None or not row["tokens_per_second"]:
            continue
        seconds += (row["tokens"] - tokens) / row["tokens_per_second"]
        tokens = row["tokens"]
        curve.append(LossPoint(row["step"], tokens, seconds, row["loss"]))
    return curve
