"""A plan as one HTML page: memory through a run, stacked by kind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from itertools import groupby, pairwise
from typing import NamedTuple

from markupsafe import Markup

from qlora_cli.common.formatting import size_text
from qlora_cli.common.html import page, render, template
from qlora_cli.plan.report import PlanReport, TimelineMoment
from qlora_cli.plan.text import moment_text, plan_text

_COLOURS = (
    "#4878cf", "#7aa6e8", "#2f4b8f", "#e08214", "#8c6bb1", "#d6604d", "#3a9e6d", "#8fc98f",
    "#c9a227", "#8a8a8a", "#b0527f", "#5f9ea0",
)  # fmt: skip
_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 900, 360, 70, 20, 40
_SHARES = {"load": 1, "first step": 2, "step": 5, "evaluation": 2}
"""Shares of the width; a stage that is one moment has 1."""
_IN_VIEW = 2.5
"""Draw the memory of the device up to this multiple of the peak; beyond, the plan is too small."""

_STYLE = """\
.swatch { display: inline-block; width: .9em; height: .9em; margin-right: .5em; }
"""

_BODY = template("""\
{{ picture }}
{% if beyond %}
<p>{{ device.name }} has {{ device.bytes|size }}, which is beyond the picture.</p>
{% endif %}
<h2>At the peak ({{ moment }})</h2>
<div class="wide"><table>
<tr><th>kind</th><th class="number">size</th><th class="number">bytes</th><th>known by</th></tr>
{% for kind, colour in colours.items() %}
{% set size = peak.kinds.get(kind, 0) %}
<tr><td><span class="swatch" style="background: {{ colour }}"></span>{{ kind }}</td>\
<td class="number">{{ size|size }}</td><td class="number">{{ size|comma }}</td>\
<td>{% if size %}{{ "a formula" if kind in peak.by_formula else "the trace" }}{% endif %}</td></tr>
{% endfor %}
<tr><th>all tensors</th><td class="number">{{ peak.bytes|size }}</td>\
<td class="number">{{ peak.bytes|comma }}</td></tr>
</table></div>
<h2>In words</h2>
<pre>{{ text }}</pre>
""")


class _Point(NamedTuple):
    x: float
    kinds: Mapping[str, int]


def plan_page(report: PlanReport, *, title: str) -> str:
    """Render the picture, a table of the peak, and the plan as text, from the report of `plan`."""
    kinds = list(dict.fromkeys(k for moment in report.timeline for k in moment.kinds))
    colours = {kind: _COLOURS[i % len(_COLOURS)] for i, kind in enumerate(kinds)}
    peak, device = report.peak, report.device
    body = render(
        _BODY,
        picture=Markup("\n".join(_picture(report, colours))),
        beyond=device.bytes is not None and _memory_in_view(report) is None,
        device=device,
        moment=moment_text(peak.stage, peak),
        peak=peak,
        colours=colours,
        text=plan_text(report),
    )
    return page(title, body, style=_STYLE)


def _memory_in_view(report: PlanReport) -> int | None:
    """Return the device's memory if it is drawn as a line, else None."""
    memory = report.device.bytes
    return memory if memory is not None and memory <= _IN_VIEW * report.peak.bytes else None


def _picture(report: PlanReport, colours: Mapping[str, str]) -> Iterator[str]:
    top, memory = report.peak.bytes, _memory_in_view(report)
    highest = 1.05 * max(top, memory or 0)
    points, bands = _places(report.timeline)

    def y(size: float) -> str:
        return f"{_TOP + (_HEIGHT - _TOP - _BOTTOM) * (1 - size / highest):.1f}"

    yield (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-labelledby="name words">'
        f'<title id="name">Memory through the run</title><desc id="words">'
        f"{escape(_words(report))}</desc>"
    )
    for band in points:
        below = [0] * len(band)
        for kind, colour in colours.items():
            above = [b + p.kinds.get(kind, 0) for b, p in zip(below, band, strict=True)]
            corners = [
                *((p.x, size) for p, size in zip(band, above, strict=True)),
                *reversed([(p.x, size) for p, size in zip(band, below, strict=True)]),
            ]
            shape = " ".join(f"{x:.1f},{y(size)}" for x, size in corners)
            if above != below:
                yield f'<polygon fill="{colour}" points="{shape}"><title>{kind}</title></polygon>'
            below = above
    for name, x in bands:
        yield f'<text x="{x:.1f}" y="{_HEIGHT - 22}">{escape(name)}</text>'
    yield _level(y(0), "0")
    yield _level(y(top), size_text(top), f"peak, {report.peak.stage}")
    if memory is not None:
        yield _level(y(memory), size_text(memory), report.device.name)
    yield "</svg>"


def _level(y: str, size: str, name: str = "") -> str:
    """Draw a labelled line across the picture."""
    label = f'<text x="{_WIDTH}" y="{float(y) - 4}" text-anchor="end">{escape(name)}</text>'
    return (
        f'<line x1="{_LEFT}" x2="{_WIDTH}" y1="{y}" y2="{y}" stroke-dasharray="4 3"/>{label}'
        f'<text x="{_LEFT - 5}" y="{float(y) + 4}" text-anchor="end">{size}</text>'
    )


def _places(
    timeline: Sequence[TimelineMoment],
) -> tuple[list[list[_Point]], list[tuple[str, float]]]:
    """Place each moment, stage by stage; return also each stage's name and left end."""
    stages = [(name, list(moments)) for name, moments in groupby(timeline, lambda m: m.stage)]
    shares = [_SHARES.get(name, 1) if len(moments) > 1 else 1 for name, moments in stages]
    unit, left = (_WIDTH - _LEFT) / sum(shares), float(_LEFT)
    points, bands = [], []
    for (name, moments), share in zip(stages, shares, strict=True):
        width = share * unit - 4
        if len(moments) == 1:
            moments *= 2
            steps = [0, 1]
        else:
            steps = _steps(moments)
        points.append(
            [
                _Point(left + width * at / steps[-1], moment.kinds)
                for at, moment in zip(steps, moments, strict=True)
            ]
        )
        bands.append((name, left))
        left += share * unit
    return points, bands


def _steps(moments: Sequence[TimelineMoment]) -> list[int]:
    """Compute each moment's distance from the first; extrapolated layers get their width too."""
    steps = [0]
    for before, now in pairwise(moments):
        same = (before.turn, before.during) == (now.turn, now.during)
        distance = 1
        if same and before.place is not None and now.place is not None:
            distance = abs(now.place - before.place)
        steps.append(steps[-1] + distance)
    return steps


def _words(report: PlanReport) -> str:
    """Describe the picture for screen readers."""
    peaks = ", ".join(f"{name} {size_text(m.bytes)}" for name, m in report.stages.items())
    stage = moment_text(report.peak.stage, report.peak)
    return (
        f"Bytes of tensors, stacked by kind, through the stages of the run. The peak of each: "
        f"{peaks}. The highest is {size_text(report.peak.bytes)} ({stage})."
    )
