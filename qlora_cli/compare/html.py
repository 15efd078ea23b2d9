"""A comparison as one HTML page."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from markupsafe import Markup

from qlora_cli.common.formatting import MIB, size_text
from qlora_cli.common.html import page, render, template
from qlora_cli.compare.report import CellReport, CompareReport
from qlora_cli.compare.svg_plots import (
    Interval,
    LineSeries,
    StackedBar,
    interval_plot,
    line_plot,
    stack_plot,
)
from qlora_cli.compare.text import failures, numbers, tables
from qlora_cli.evaluate.bootstrap import Estimate
from qlora_cli.evaluate.report import MeasureInfo

_STYLE = """\
table { white-space: nowrap; }
td, th { text-align: right; }
td:first-child, th:first-child { text-align: left; }
tr:nth-child(even) { background: var(--block); }
"""

_BODY = template("""\
<p>The same rows in the same order, the same seed and the same budget for all.</p>
{% for title, rows in tables %}
<h2>{{ title[0]|upper }}{{ title[1:] }}</h2>
<div class="wide"><table>
<tr>{% for cell in rows[0] %}<th>{{ cell }}</th>{% endfor %}</tr>
{% for row in rows[1:] %}
<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
{% endfor %}
{% if failures %}
<h2>Failures</h2>
<ul>
{% for name, why in failures %}
<li>{{ name }}: {{ why }}</li>
{% endfor %}
</ul>
{% endif %}
<h2>Plots</h2>
{% for plot, text in plots %}
<figure>{{ plot }}<figcaption>{{ text }}</figcaption></figure>
{% endfor %}
""")


def comparison_page(report: CompareReport) -> str:
    """Return the tables and plots of a report as a page."""
    body = render(
        _BODY,
        tables=list(tables(report)),
        failures=list(failures(report)),
        plots=[(Markup(plot), text) for plot, text in _plots(report)],
    )
    return page(f"Comparison: {report.folder}", body, style=_STYLE)


def _plots(report: CompareReport) -> Iterator[tuple[str, str]]:
    cells = report.cells
    begun = [cell for cell in cells if cell.curve]
    by_tokens = [LineSeries(c.name, [(p.tokens, p.loss) for p in c.curve]) for c in begun]
    by_time = [LineSeries(c.name, [(p.seconds, p.loss) for p in c.curve]) for c in begun]
    for axis, lines in (("tokens", by_tokens), ("seconds of training", by_time)):
        if lines:
            title = f"Training loss by {axis}"
            yield line_plot(title, lines, x=axis, y="loss", form="{:,.0f}".format), title
    if stacks := [*_stacks(cells)]:
        title = "Peak memory: planned tensors by kind"
        text = f"{title}; the vertical line is the measured memory of the process"
        yield stack_plot(title, stacks, mark="measured", form=_mib_text), text
    for name, measure in report.measures.items():
        intervals = [Interval(cell.name, **e.to_json()) for cell, e in _estimates(cells, name)]
        if intervals:
            text = f"{name}, with {report.confidence:.0%} intervals"
            yield interval_plot(text, intervals, form=_form(measure)), text
            yield from _varied(report, name, measure)


def _stacks(cells: Sequence[CellReport]) -> Iterator[StackedBar]:
    """Yield the planned memory of each cell in MiB, which gives round ticks."""
    for cell in cells:
        if kinds := cell.memory.planned_kinds:
            parts = {kind: size / MIB for kind, size in kinds.items()}
            measured = cell.memory.measured_bytes
            yield StackedBar(cell.name, parts, measured and measured / MIB)


def _mib_text(size: float) -> str:
    return size_text(size * MIB)


def _estimates(cells: Sequence[CellReport], name: str) -> Iterator[tuple[CellReport, Estimate]]:
    """Yield cells whose value is known and finite."""
    for cell in cells:
        estimate = (cell.results or {}).get(name)
        if estimate and math.isfinite(estimate.value):
            yield cell, estimate


def _form(measure: MeasureInfo) -> Any:
    return "{:.1%}".format if measure.is_share else "{:.4g}".format


def _varied(report: CompareReport, name: str, measure: MeasureInfo) -> Iterator[tuple[str, str]]:
    """Plot each numeric varied key against a measure, with a line for each other setting."""
    for key in report.varied:
        found = [(c, e) for c, e in _estimates(report.cells, name) if key in c.settings]
        values = numbers([cell.settings[key] for cell, _ in found])
        if not found or values is None or len(set(values)) < 2:
            continue
        lines: dict[str, list[tuple[float, float]]] = {}
        for x, (cell, estimate) in zip(values, found, strict=True):
            several = len({one.recipe for one in report.cells}) > 1
            lines.setdefault(_rest(cell, key, several=several), []).append((x, estimate.value))
        drawn = [LineSeries(rest, sorted(points)) for rest, points in lines.items()]
        text = f"{name} by {key}"
        yield line_plot(text, drawn, x=key, y=name, form="{:g}".format), text


def _rest(cell: CellReport, key: str, *, several: bool) -> str:
    """Name a cell without one key; with its recipe, if there are several."""
    others = [f"{k}={v}" for k, v in cell.settings.items() if k != key]
    recipe = [cell.recipe] if several and cell.method else []
    return " ".join([*recipe, cell.method or cell.recipe, *others])
