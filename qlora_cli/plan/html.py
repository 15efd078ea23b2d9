"""A plan as one HTML page: memory through a run, stacked by kind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from itertools import groupby, pairwise
from typing import NamedTuple

from markupsafe import Markup

from qlora_cli.common.formatting import size_text
from qlora_cli.common.html import page, render, template
from qlora_cli.common.svg import LINE_HEIGHT, RIGHT, WIDTH, label, svg, text_width
from qlora_cli.plan.report import PlanReport, TimelineMoment
from qlora_cli.plan.text import moment_text, plan_text

_COLOURS = (
    "#4878cf", "#7aa6e8", "#2f4b8f", "#e08214", "#8c6bb1", "#d6604d", "#3a9e6d", "#8fc98f",
    "#c9a227", "#8a8a8a", "#b0527f", "#5f9ea0",
)  # fmt: skip
_TOP, _HEIGHT = 8, 300
"""Upper edge of the area of the picture, and its height."""
_SHARES = {"load": 1, "first step": 2, "step": 5, "evaluation": 2}
"""Shares of the width; a stage that is one moment has 1."""
_IN_VIEW = 2.5
"""Draw the memory of the device up to this multiple of the peak; beyond, the plan is too small."""

_STYLE = """\
.swatch { display: inline-block; width: .9em; height: .9em; margin-right: .5em; }
"""

_BODY = template("""\
<figure>{{ picture }}<figcaption>Memory of tensors through the run, by kind. The dashed lines are \
the peak, {{ peak.bytes|size }} ({{ moment }})\
{% if in_view %}, and the memory of {{ device.name }}, {{ device.bytes|size }}{% endif %}.\
{% if device.bytes and not in_view %} {{ device.name }} has {{ device.bytes|size }}, which is \
beyond the picture.{% endif %}</figcaption></figure>
<h2>At the peak ({{ moment }})</h2>
{% call wide("memory at the peak, by kind") %}
<table>
<tr><th>kind</th><th class="number">size</th><th class="number">bytes</th><th>known by</th></tr>
{% for kind, colour in colours.items() %}
{% set size = peak.kinds.get(kind, 0) %}
<tr><td><span class="swatch" style="background: {{ colour }}"></span>{{ kind }}</td>\
<td class="number">{{ size|size }}</td><td class="number">{{ size|comma }}</td>\
<td>{% if size %}{{ "a formula" if kind in peak.by_formula else "the trace" }}{% endif %}</td></tr>
{% endfor %}
<tr><th>all tensors</th><td class="number">{{ peak.bytes|size }}</td>\
<td class="number">{{ peak.bytes|comma }}</td></tr>
</table>
{% endcall %}
<h2>In words</h2>
<pre>{{ text }}</pre>
""")


class _Point(NamedTuple):
    x: float
    kinds: Mapping[str, int]


class _Band(NamedTuple):
    """A stage, from its left end."""

    name: str
    x: float


def plan_page(report: PlanReport, *, title: str) -> str:
    """Render the picture, a table of the peak, and the plan as text, from the report of `plan`."""
    kinds = list(dict.fromkeys(k for moment in report.timeline for k in moment.kinds))
    colours = {kind: _COLOURS[i % len(_COLOURS)] for i, kind in enumerate(kinds)}
    peak, device = report.peak, report.device
    body = render(
        _BODY,
        picture=Markup(_picture(report, colours)),
        in_view=_memory_in_view(report) is not None,
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


def _picture(report: PlanReport, colours: Mapping[str, str]) -> str:
    top, memory = report.peak.bytes, _memory_in_view(report)
    highest = 1.05 * max(top, memory or 0)
    levels = [0, top] if memory is None else [0, top, memory]
    left = max(text_width(size_text(size)) for size in levels) + 10
    points, bands = _places(report.timeline, left)

    def y(size: float) -> float:
        return round(_TOP + _HEIGHT * (1 - size / highest), 1)

    body = []
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
                body.append(
                    f'<polygon fill="{colour}" points="{shape}">'
                    f"<title>{escape(kind)}</title></polygon>"
                )
            below = above
    for size in levels:
        body.append(
            f'<line x1="{left:.1f}" x2="{WIDTH - RIGHT}" y1="{y(size)}" y2="{y(size)}" '
            'stroke-dasharray="4 3"/>'
        )
    body += _level_texts({size: y(size) for size in levels}, left)
    names, height = _band_names(bands)
    return svg("Memory through the run", _words(report), [*body, *names], height)


def _level_texts(places: Mapping[int, float], left: float) -> Iterator[str]:
    """Write the size of each level at its line, or below the next higher one if they are close."""
    end = 0.0
    for size, y in sorted(places.items(), reverse=True):
        end = max(y + 4, end + LINE_HEIGHT, LINE_HEIGHT - 4)
        yield label(size_text(size) if size else "0", left - 6, end, anchor="end")


def _band_names(bands: Sequence[_Band]) -> tuple[list[str], float]:
    """Write the name of each stage below it, in the first line that has room.

    Returns:
        The elements, and the height of the picture.
    """
    drawn: list[str] = []
    ends: list[float] = []
    top = _TOP + _HEIGHT + LINE_HEIGHT
    for band in bands:
        width = text_width(band.name)
        x = max(0, min(band.x, WIDTH - width))
        line = next((i for i, end in enumerate(ends) if x >= end), len(ends))
        ends[line : line + 1] = [x + width + 8]
        drawn.append(label(band.name, x, top + LINE_HEIGHT * line))
    return drawn, top + LINE_HEIGHT * len(ends)


def _places(
    timeline: Sequence[TimelineMoment], left: float
) -> tuple[list[list[_Point]], list[_Band]]:
    """Place each moment, stage by stage; return also each stage's name and left end."""
    stages = [(name, list(moments)) for name, moments in groupby(timeline, lambda m: m.stage)]
    shares = [_SHARES.get(name, 1) if len(moments) > 1 else 1 for name, moments in stages]
    unit = (WIDTH - RIGHT - left) / sum(shares)
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
        bands.append(_Band(name, left))
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
