"""A comparison as text tables. Programs read comparison.json instead."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from qlora_cli.common.formatting import align_table, duration_text, interval_text, size_text

CellReport = Mapping[str, Any]
Table = list[list[str]]

UNKNOWN = "-"
MODELS = ("base", "tuned", "merged")
"""Models whose generation is measured: base, base with adapter, and merged."""


def comparison_text(report: CellReport) -> str:
    """Format all tables, then the failures."""
    parts = [f"{report['folder']}: the same data, seed and budget for all"]
    for title, table in tables(report):
        parts += ["", title, *align_table(table)]
    failed = list(failures(report))
    parts += ["", *(f"{name}: {why}" for name, why in failed)] if failed else []
    return "\n".join([*parts, "", f"with plots: {report['folder']}/comparison.html"])


def tables(report: CellReport) -> Iterator[tuple[str, Table]]:
    """Yield the title and the rows of each table; the first row is the head."""
    yield "training", training_table(report)
    yield "generation, one prompt at a time", generation_table(report)
    if report["measures"]:
        yield results_title(report), results_table(report, "results")
        yield f"difference from {report['first']}", results_table(report, "differences")
        yield (
            "difference from the base, quantized as in the cell",
            results_table(report, "from_base"),
        )


def results_title(report: CellReport) -> str:
    """Return the title of the table of results."""
    return f"results, with {report['confidence']:.0%} intervals (bootstrap over the examples)"


def training_table(report: CellReport) -> Table:
    """Return what was trained, and what it cost."""
    head = ["", "status", "trained", "share", "files", "planned", "measured", "tokens/s", "took"]
    return [head, *([cell["name"], *_training(cell)] for cell in report["cells"])]


def _training(cell: CellReport) -> list[str]:
    memory = cell["memory"]
    planned = memory["planned_process_bytes"]
    return [
        cell["status"],
        or_unknown(cell["trained_weights"], "{:,}".format),
        or_unknown(cell["trained_share"], "{:.3%}".format),
        or_unknown(cell["weights_bytes"], size_text),
        or_unknown(planned, lambda ends: " to ".join(map(size_text, ends))),
        or_unknown(memory["measured_bytes"], size_text),
        or_unknown(cell["tokens_per_second"], "{:,.0f}".format),
        or_unknown(cell["seconds"], duration_text),
    ]


def generation_table(report: CellReport) -> Table:
    """Return the time to the first token, and the tokens per second after it."""
    first = [f"first token, {model}" for model in MODELS]
    rest = [f"tokens/s, {model}" for model in MODELS]
    rows = [[cell["name"], *_speeds(cell)] for cell in report["cells"]]
    return [["", *first, *rest], *rows]


def _speeds(cell: CellReport) -> Iterator[str]:
    found = cell["generation"] or {}
    speeds = [found.get(model) or {} for model in MODELS]
    for key, form in (
        ("first_token_seconds", lambda value: f"{1000 * value:,.0f} ms"),
        ("tokens_per_second", "{:,.1f}".format),
    ):
        yield from (
            "refused" if "error" in one else or_unknown(one.get(key), form) for one in speeds
        )


def results_table(report: CellReport, which: str) -> Table:
    """Return every measure of every cell, or its difference from another model."""
    measures = report["measures"]
    sign = "" if which == "results" else "+"
    found = {cell["name"]: cell[which] for cell in report["cells"]}
    if which == "results":
        found = {**{f"base {name}": base for name, base in report["bases"].items()}, **found}
    rows = [
        [name, *(_estimate(one, key, measure, sign) for key, measure in measures.items())]
        for name, one in found.items()
    ]
    head = [f"{name} (n={measure['n']:,})" for name, measure in measures.items()]
    return [["", *head], *rows]


def _estimate(found: CellReport | None, name: str, measure: CellReport, sign: str) -> str:
    estimate = (found or {}).get(name)
    return or_unknown(estimate, lambda e: interval_text(e, is_share=measure["is_share"], sign=sign))


def failures(report: CellReport) -> Iterator[tuple[str, str]]:
    """Yield the cell and the reason of each failed run, plan and merge."""
    for cell in report["cells"]:
        found = {
            cell["status"]: cell["failure"],
            "not planned": cell["memory"]["plan_error"] and {"error": cell["memory"]["plan_error"]},
            "merging refused": (cell["generation"] or {}).get("merged"),
        }
        for what, one in found.items():
            if one and "error" in one:
                hint = f" (hint: {one['hint']})" if one.get("hint") else ""
                yield cell["name"], f"{what}: {one['error']}{hint}"


def or_unknown(value: Any, form: Callable[[Any], str]) -> str:
    """Format a value, or return a dash if it is unknown."""
    return UNKNOWN if value is None else form(value)


def numbers(values: Sequence[str]) -> list[float] | None:
    """Return the values as numbers; None if one is not a number."""
    try:
        return [float(value) for value in values]
    except ValueError:
        return None
