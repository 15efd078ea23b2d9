"""A comparison as one HTML page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from markupsafe import Markup

from qlora_cli.common.formatting import GIB, MIB
from qlora_cli.common.html import page, render, template
from qlora_cli.common.svg import NumberFormat, number_form, percent_form
from qlora_cli.compare.report import CellReport, CompareReport
from qlora_cli.compare.svg_plots import (
    Interval,
    IntervalSeries,
    LineSeries,
    StackedBar,
    interval_plot,
    is_finite,
    line_plot,
    point_plot,
    stack_plot,
)
from qlora_cli.compare.text import failures, numbers, tables
from qlora_cli.evaluate.bootstrap import Estimate
from qlora_cli.evaluate.report import MeasureInfo

_STYLE = """\
table { white-space: nowrap; }
td, th { text-align: right; }
td:first-child, th:first-child { text-align: left; }
tr:nth-child(even) { background: var(--stripe); }
"""

_BODY = template("""\
<p>The same rows in the same order, the same seed and the same budget for all.</p>
{% for title, rows in tables %}
<h2>{{ title[0]|upper }}{{ title[1:] }}</h2>
{% call wide(title) %}
<table>
<tr>{% for cell in rows[0] %}<th>{{ cell }}</th>{% endfor %}</tr>
{% for row in rows[1:] %}
<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table>
{% endcall %}
{% endfor %}
{% if failures %}
<h2>Failures</h2>
<ul>
{% for name, why in failures %}
<li>{{ name }}: {{ why }}</li>
{% endfor %}
</ul>
{% endif %}
{% if plots %}
<h2>Plots</h2>
{% endif %}
{% for plot, text, notes in plots %}
<figure>{{ plot }}<figcaption>{{ text }}\
{% if notes %}<ul>{% for note in notes %}<li>{{ note }}</li>{% endfor %}</ul>{% endif %}\
</figcaption></figure>
{% endfor %}
""")


_FORMS: dict[int, NumberFormat] = {
    MIB: lambda size, digits: f"{number_form(size, digits)} MiB",
    GIB: lambda size, digits: f"{number_form(size, digits)} GiB",
}


def comparison_page(report: CompareReport) -> str:
    """Return the tables and plots of a report as a page."""
    body = render(
        _BODY,
        tables=list(tables(report)),
        failures=list(failures(report)),
        plots=[(Markup(plot), text, notes) for plot, text, notes in _plots(report)],
    )
    return page(f"Comparison: {report.folder}", body, style=_STYLE)


def _plots(report: CompareReport) -> Iterator[tuple[str, str, list[str]]]:
    """Yield each plot, its caption, and notes on what it shows."""
    cells = report.cells
    begun = [cell for cell in cells if any(is_finite(point.loss) for point in cell.curve)]
    by_tokens = [LineSeries(c.name, [(p.tokens, p.loss) for p in c.curve]) for c in begun]
    by_time = [LineSeries(c.name, [(p.seconds, p.loss) for p in c.curve]) for c in begun]
    for axis, lines in (("tokens", by_tokens), ("seconds of training", by_time)):
        if lines:
            title = f"Training loss by {axis}"
            text = f"{title}: one run per line, without intervals; the axes may begin above zero"
            yield line_plot(title, lines, x=axis, y="loss", form=number_form), text, []
    unit = _memory_unit(cells)
    if stacks := [*_stacks(cells, unit)]:
        title = "Peak memory: planned tensors by kind"
        text = title
        if any(stack.mark is not None for stack in stacks):
            text += "; the vertical line is the measured memory of the process"
        yield stack_plot(title, stacks, mark="measured", form=_FORMS[unit]), text, []
    for name, measure in report.measures.items():
        found = [(cell, _interval(cell, name)) for cell in cells if name in (cell.results or {})]
        if any(is_finite(one.value) for _, one in found):
            text, notes = _caption(report, name, found), _notes(report, name, measure)
            intervals = [one for _, one in found]
            yield interval_plot(text, intervals, form=_form(measure)), text, notes
            yield from _varied(report, name, measure, notes)


def _interval(cell: CellReport, name: str) -> Interval:
    return Interval(cell.name, **(cell.results or {})[name].to_json())


def _caption(report: CompareReport, name: str, found: Sequence[tuple[CellReport, Interval]]) -> str:
    """Say what a plot of a measure shows."""
    if any(one.ends for _, one in found):
        return f"{name}, with {report.confidence:.0%} intervals"
    return f"{name}; no intervals are known"


def _notes(report: CompareReport, name: str, measure: MeasureInfo) -> list[str]:
    """Say which cells differ from the first one by more than noise."""
    groups: dict[str, list[str]] = {}
    level = f"{report.confidence:.0%}"
    for cell in report.cells:
        difference = (cell.differences or {}).get(name)
        if difference:
            words = _verdict(difference, measure, report.first or "", level)
            groups.setdefault(words, []).append(cell.name)
    return [f"{words}: {', '.join(names)}" for words, names in groups.items()]


def _verdict(difference: Estimate, measure: MeasureInfo, first: str, level: str) -> str:
    """Judge a paired difference from the first cell by its interval."""
    low, high = difference.low, difference.high
    if not is_finite(low) or not is_finite(high):
        return f"No {level} interval of the paired difference from {first} is known"
    if low <= 0 <= high:
        return f"Within noise of {first} (the {level} interval of the difference contains zero)"
    if measure.lower_is_better is None:
        word = "Higher" if low > 0 else "Lower"
    else:
        word = "Better" if (high < 0) == measure.lower_is_better else "Worse"
    return f"{word} than {first} (the {level} interval of the difference does not contain zero)"


def _stacks(cells: Sequence[CellReport], unit: int) -> Iterator[StackedBar]:
    """Yield the planned memory of each cell in MiB or GiB, which gives round ticks."""
    for cell in cells:
        if kinds := cell.memory.planned_kinds:
            parts = {kind: size / unit for kind, size in kinds.items()}
            measured = cell.memory.measured_bytes
            yield StackedBar(cell.name, parts, measured and measured / unit)


def _memory_unit(cells: Sequence[CellReport]) -> int:
    sizes = [cell.memory.measured_bytes or 0 for cell in cells]
    sizes += [sum((cell.memory.planned_kinds or {}).values()) for cell in cells]
    return GIB if max(sizes, default=0) >= GIB else MIB


def _form(measure: MeasureInfo) -> NumberFormat:
    return percent_form if measure.is_share else number_form


def _varied(
    report: CompareReport, name: str, measure: MeasureInfo, notes: list[str]
) -> Iterator[tuple[str, str, list[str]]]:
    """Plot a measure by each numeric varied key, with a series for each other setting."""
    several = len({one.recipe for one in report.cells}) > 1
    for key in report.varied:
        cells = [c for c in report.cells if key in c.settings and name in (c.results or {})]
        found = [(cell, _interval(cell, name)) for cell in cells]
        values = numbers([cell.settings[key] for cell in cells])
        if not any(is_finite(one.value) for _, one in found) or values is None:
            continue
        if len(set(values)) < 2:
            continue
        series: dict[str, list[tuple[float, Interval]]] = {}
        for x, (cell, one) in zip(values, found, strict=True):
            series.setdefault(_rest(cell, key, several=several), []).append((x, one))
        drawn = [
            IntervalSeries(rest, sorted(points, key=lambda point: point[0]))
            for rest, points in series.items()
        ]
        text = _caption(report, f"{name} by {key}", found)
        yield point_plot(text, drawn, x=key, y=name, form=_form(measure)), text, notes


def _rest(cell: CellReport, key: str, *, several: bool) -> str:
    """Name a cell without one key; with its recipe, if there are several."""
    others = [f"{k}={v}" for k, v in cell.settings.items() if k != key]
    recipe = [cell.recipe] if several and cell.method else []
    return " ".join([*recipe, cell.method or cell.recipe, *others])
