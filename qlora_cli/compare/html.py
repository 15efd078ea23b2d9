"""A comparison as one HTML page that needs nothing else: no script, no font, no network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from qlora_cli.common.formatting import size_text
from qlora_cli.compare.svg_plots import (
    Interval,
    Line,
    Stack,
    interval_plot,
    line_plot,
    stack_plot,
)
from qlora_cli.compare.text import failures, numbers, tables

Row = Mapping[str, Any]

_MIB = 2**20

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 64em; margin: 2em auto; padding: 0 1em;
  color: #222; background: #fff; }
h2 { border-bottom: 1px solid #ccc; margin-top: 2em; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; white-space: nowrap; }
td, th { padding: .15em .8em .15em 0; text-align: right; }
td:first-child, th:first-child { text-align: left; }
tr:nth-child(even) { background: #f4f4f4; }
figure { margin: 1.5em 0; }
svg { width: 100%; height: auto; color: inherit; }
svg text { font: 12px system-ui, sans-serif; fill: currentColor; }
.grid { stroke: currentColor; stroke-opacity: .15; }
@media (prefers-color-scheme: dark) {
  body { color: #ddd; background: #181818; }
  tr:nth-child(even) { background: #242424; }
}
"""


def comparison_page(report: Row) -> str:
    """Tables and plots of a report. Whatever comes from recipes and runs is escaped."""
    title = f"Comparison: {report['folder']}"
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8"/>',
            # Should an escape be forgotten one day, the browser still runs and fetches nothing.
            '<meta http-equiv="Content-Security-Policy" '
            "content=\"default-src 'none'; style-src 'unsafe-inline'\"/>",
            '<meta name="viewport" content="width=device-width"/>',
            f"<title>{escape(title)}</title>\n<style>{_STYLE}</style></head>",
            f"<body><h1>{escape(title)}</h1>",
            "<p>The same rows in the same order, the same seed and the same budget for all.</p>",
            *_tables(report),
            *_failures(report),
            "<h2>Plots</h2>",
            *(f"<figure>{plot}<figcaption>{escape(text)}</figcaption></figure>"
              for plot, text in _plots(report)),
            "</body></html>\n",
        ]
    )  # fmt: skip


def _tables(report: Row) -> Iterator[str]:
    for title, (head, *rows) in tables(report):
        yield f'<h2>{escape(title[0].upper() + title[1:])}</h2>\n<div class="wide"><table>'
        yield _tr(head, "th")
        yield from (_tr(row, "td") for row in rows)
        yield "</table></div>"


def _tr(cells: Sequence[str], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def _failures(report: Row) -> Iterator[str]:
    found = list(failures(report))
    if found:
        yield "<h2>What did not work</h2>\n<ul>"
        yield from (f"<li>{escape(name)}: {escape(why)}</li>" for name, why in found)
        yield "</ul>"


def _plots(report: Row) -> Iterator[tuple[str, str]]:
    cells = report["cells"]
    for key, axis, form in (
        ("tokens", "tokens", "{:,.0f}".format),
        ("seconds", "seconds of training", "{:,.0f}".format),
    ):
        lines = [
            Line(cell["name"], [(p[key], p["loss"]) for p in cell["curve"]])
            for cell in cells
            if cell["curve"]
        ]
        if lines:
            title = f"Training loss by {axis}"
            yield line_plot(title, lines, x=axis, y="loss", form=form), title
    if stacks := [*_stacks(cells)]:
        title = "Memory at the peak: tensors by kind as planned"
        text = f"{title}; the line across is what the process took as measured"
        yield stack_plot(title, stacks, mark="measured", form=_mib_text), text
    for name, measure in report["measures"].items():
        intervals = [Interval(cell["name"], **e) for cell, e in _estimates(cells, name)]
        if intervals:
            text = f"{name}, with {report['confidence']:.0%} intervals"
            yield interval_plot(text, intervals, form=_form(measure)), text
            yield from _varied(report, name, measure)


def _stacks(cells: Sequence[Row]) -> Iterator[Stack]:
    """In MiB, so that the ticks are round."""
    for cell in cells:
        memory = cell["memory"]
        if kinds := memory["planned_kinds"]:
            parts = {kind: size / _MIB for kind, size in kinds.items()}
            measured = memory["measured_bytes"]
            yield Stack(cell["name"], parts, measured and measured / _MIB)


def _mib_text(size: float) -> str:
    return size_text(size * _MIB)


def _estimates(cells: Sequence[Row], name: str) -> Iterator[tuple[Row, Row]]:
    """Cells whose figure is known, and finite."""
    for cell in cells:
        estimate = (cell["results"] or {}).get(name)
        if estimate and estimate["value"] is not None:
            yield cell, estimate


def _form(measure: Row) -> Any:
    return "{:.1%}".format if measure["is_share"] else "{:.4g}".format


def _varied(report: Row, name: str, measure: Row) -> Iterator[tuple[str, str]]:
    """Each varied key with numbers against the outcome: a line for what else is the same."""
    for key in report["varied"]:
        found = [(c, e) for c, e in _estimates(report["cells"], name) if key in c["settings"]]
        values = numbers([cell["settings"][key] for cell, _ in found])
        if not found or values is None or len(set(values)) < 2:
            continue
        lines: dict[str, list[tuple[float, float]]] = {}
        for x, (cell, estimate) in zip(values, found, strict=True):
            several = len({one["recipe"] for one in report["cells"]}) > 1
            lines.setdefault(_rest(cell, key, several=several), []).append((x, estimate["value"]))
        drawn = [Line(rest, sorted(points)) for rest, points in lines.items()]
        text = f"{name} by {key}"
        yield line_plot(text, drawn, x=key, y=name, form="{:g}".format), text


def _rest(cell: Row, key: str, *, several: bool) -> str:
    """What a cell is, but for one key; with its recipe, where there are several."""
    method = cell["method"] or cell["recipe"]
    others = [f"{k}={v}" for k, v in cell["settings"].items() if k != key]
    is_named = several and cell["method"]
    return " ".join([*([cell["recipe"]] if is_named else []), method, *others])
