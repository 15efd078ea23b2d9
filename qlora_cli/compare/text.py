"""A comparison as text tables. Programs read comparison.json instead."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

from qlora_cli.common.formatting import align_table, duration_text, interval_text, size_text
from qlora_cli.common.report import ABSENT, Absent
from qlora_cli.compare.report import CellReport, CompareReport, Latency
from qlora_cli.evaluate.bootstrap import Estimate
from qlora_cli.evaluate.report import MeasureInfo

Table = list[list[str]]

UNKNOWN = "-"
MODELS = ("base", "tuned", "merged")
"""Models whose generation is measured: base, base with adapter, and merged."""


def comparison_text(report: CompareReport) -> str:
    """Format all tables, then the failures."""
    parts = [f"{report.folder}: the same data, seed and budget for all"]
    for title, table in tables(report):
        parts += ["", title, *align_table(table)]
    failed = list(failures(report))
    parts += ["", *(f"{name}: {why}" for name, why in failed)] if failed else []
    return "\n".join([*parts, "", f"with plots: {report.folder}/comparison.html"])


def tables(report: CompareReport) -> Iterator[tuple[str, Table]]:
    """Yield the title and the rows of each table that has a value; the first row is the head."""
    found = [
        ("training", training_table(report)),
        ("generation, one prompt at a time", generation_table(report)),
        (results_title(report), results_table(report, "results")),
        (f"difference from {report.first}", results_table(report, "differences")),
        (
            "difference from the base, quantized as in the cell",
            results_table(report, "from_base"),
        ),
    ]
    for title, table in found:
        known = _known_part(table)
        if len(known) > 1:
            yield title, known


def _known_part(table: Table) -> Table:
    """Leave out the rows and columns in which nothing is known."""
    head, *rows = table
    rows = [row for row in rows if set(row[1:]) - {UNKNOWN, ""}]
    shown = [i for i in range(len(head)) if i == 0 or {row[i] for row in rows} - {UNKNOWN, ""}]
    return [[row[i] for i in shown] for row in (head, *rows)]


def results_title(report: CompareReport) -> str:
    """Return the title of the table of results."""
    return f"results, with {report.confidence:.0%} intervals (bootstrap over the examples)"


def training_table(report: CompareReport) -> Table:
    """Return what was trained, and what it cost. A cell without figures shows only its status."""
    head = ["", "status", "trained", "share", "files", "planned", "measured", "tokens/s", "took"]
    rows = []
    for cell in report.cells:
        values = _training(cell)
        is_known = any(value != UNKNOWN for value in values)
        rows.append([cell.name, cell.status, *(values if is_known else [""] * len(values))])
    return [head, *rows]


def _training(cell: CellReport) -> list[str]:
    memory = cell.memory
    return [
        or_unknown(cell.trained_weights, "{:,}".format),
        or_unknown(cell.trained_share, "{:.3%}".format),
        or_unknown(cell.weights_bytes, size_text),
        or_unknown(memory.planned_process_bytes, lambda ends: " to ".join(map(size_text, ends))),
        or_unknown(memory.measured_bytes, size_text),
        or_unknown(cell.tokens_per_second, "{:,.0f}".format),
        or_unknown(cell.seconds, duration_text),
    ]


def generation_table(report: CompareReport) -> Table:
    """Return the time to the first token, and the tokens per second after it."""
    first = [f"first token, {model}" for model in MODELS]
    rest = [f"tokens/s, {model}" for model in MODELS]
    rows = [[cell.name, *_speeds(cell)] for cell in report.cells]
    return [["", *first, *rest], *rows]


def _speeds(cell: CellReport) -> Iterator[str]:
    found = cell.generation
    speeds = [Latency()] * len(MODELS) if found is None else [found.base, found.tuned, found.merged]
    for one in speeds:
        yield _speed(one, one.first_token_seconds, lambda value: f"{1000 * value:,.0f} ms")
    for one in speeds:
        yield _speed(one, one.tokens_per_second, "{:,.1f}".format)


def _speed(latency: Latency, value: float | Absent, form: Callable[[float], str]) -> str:
    if latency.error is not ABSENT:
        return "refused"
    return UNKNOWN if value is ABSENT else form(value)


def results_table(
    report: CompareReport, which: Literal["results", "differences", "from_base"]
) -> Table:
    """Return every measure of every cell, or its difference from another model."""
    measures = report.measures
    sign = "" if which == "results" else "+"
    found: dict[str, Mapping[str, Estimate] | None] = {}
    if which == "results":
        found |= {f"base {name}": base for name, base in report.bases.items()}
    found |= {cell.name: getattr(cell, which) for cell in report.cells}
    rows = [
        [name, *(_estimate(one, key, measure, sign) for key, measure in measures.items())]
        for name, one in found.items()
    ]
    head = [f"{name} (n={measure.n:,})" for name, measure in measures.items()]
    return [["", *head], *rows]


def _estimate(
    found: Mapping[str, Estimate] | None, name: str, measure: MeasureInfo, sign: str
) -> str:
    estimate = (found or {}).get(name)
    if estimate is None:
        return UNKNOWN
    return interval_text(estimate.to_json(), is_share=measure.is_share, sign=sign)


def failures(report: CompareReport) -> Iterator[tuple[str, str]]:
    """Yield the cell and the reason of each failed run, plan and merge."""
    for cell in report.cells:
        if failure := cell.failure:
            hint = f" (hint: {failure.hint})" if failure.hint else ""
            yield cell.name, f"{cell.status}: {failure.error}{hint}"
        if cell.memory.plan_error:
            yield cell.name, f"not planned: {cell.memory.plan_error}"
        if cell.generation and cell.generation.base.error is not ABSENT:
            yield cell.name, f"generation not measured: {cell.generation.base.error}"
        elif cell.generation and cell.generation.merged.error is not ABSENT:
            yield cell.name, f"merging refused: {cell.generation.merged.error}"


def or_unknown(value: Any, form: Callable[[Any], str]) -> str:
    """Format a value, or return a dash if it is unknown."""
    return UNKNOWN if value is None else form(value)


def numbers(values: Sequence[str]) -> list[float] | None:
    """Return the values as numbers; None if one is not a finite number."""
    try:
        found = [float(value) for value in values]
    except ValueError:
        return None
    return found if all(map(math.isfinite, found)) else None
