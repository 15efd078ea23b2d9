"""SVG plots for a page, without scripts, fonts or external resources.

Each plot has a title and a description, and its values are also in a table of the page. Text and
lines use the colour of the page, so that they are visible on light and dark backgrounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 720, 340
LEFT, RIGHT, TOP, BOTTOM = 70, 16, 12, 44

COLOURS = ("#3b82c4", "#d97706", "#2e9e6b", "#c2508f", "#7c6fd6", "#8a8f1f", "#c0473c", "#4f9da6")
"""Colours of medium lightness, visible on white and on black."""
DASHES = ("none", "7 3", "2 3", "9 3 2 3")

_FEW = 12
"""Maximum number of points that get markers."""

NumberFormat = Callable[[float], str]


@dataclass(frozen=True)
class LineSeries:
    """A series of points (x, y)."""

    name: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Interval:
    """A value and its interval, whose ends may be unknown."""

    name: str
    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class StackedBar:
    """Stacked parts of a whole, and a separate value for the whole."""

    name: str
    parts: dict[str, float]
    mark: float | None


class Scale:
    """Map values to positions on the page."""

    def __init__(self, values: Sequence[float], start: float, end: float, *, log: bool = False):
        self._of: Callable[[float], float] = math.log if log else float
        low, high = min(values), max(values)
        if low == high:
            low, high = (low / 2, high * 2) if log else (low - 0.5, high + 0.5)
        self.low, self.high = low, high
        self._start = start
        self._step = (end - start) / (self._of(high) - self._of(low))

    def __call__(self, value: float) -> float:
        return round(self._start + (self._of(value) - self._of(self.low)) * self._step, 2)

    def ticks(self) -> list[float]:
        """Return some round values in the range."""
        step = 10 ** math.floor(math.log10((self.high - self.low) / 3))
        # If the logarithm was rounded up, neither factor fits.
        step *= next((m for m in (5, 2) if (self.high - self.low) / (m * step) >= 3), 1)
        first = math.ceil(self.low / step)
        return [round(i * step, 12) for i in range(first, math.floor(self.high / step) + 1)]


def line_plot(
    title: str, lines: Sequence[LineSeries], *, x: str, y: str, form: NumberFormat
) -> str:
    """Plot lines, distinguished by colour and dashes. Lines with few points get markers."""
    points = [point for line in lines for point in line.points]
    values = sorted({p[0] for p in points})
    # Ranks and learning rates are spaced by factors, so use a log scale.
    is_log = len(values) <= _FEW and values[0] > 0 and values[-1] >= 8 * values[0]
    across = Scale(values, LEFT, WIDTH - RIGHT, log=is_log)
    up = Scale([p[1] for p in points], HEIGHT - BOTTOM, TOP)
    ticks = values if is_log else across.ticks()
    body = [*_axes(across, up, ticks, form, x=x, y=y)]
    for number, line in enumerate(lines):
        places = " ".join(f"{across(a)},{up(b)}" for a, b in line.points)
        body.append(
            f'<polyline points="{places}" {_stroke(number)} stroke-width="1.7" fill="none">'
            f"<title>{escape(line.name)}</title></polyline>"
        )
        if len(line.points) <= _FEW:
            body += [
                f'<circle cx="{across(a)}" cy="{up(b)}" r="3.5" {_fill(number)}>'
                f"<title>{escape(line.name)}: {form(a)}, {b:.4g}</title></circle>"
                for a, b in line.points
            ]
    legend = [*_legend([line.name for line in lines], HEIGHT)]
    found = f"{y} by {x}: " + "; ".join(
        f"{line.name} from {line.points[0][1]:.4g} to {line.points[-1][1]:.4g}" for line in lines
    )
    return _svg(title, found, [*body, *legend], HEIGHT + _legend_height(len(lines)))


def interval_plot(title: str, intervals: Sequence[Interval], *, form: NumberFormat) -> str:
    """Plot each value as a point with its interval as a bar, one per row."""
    ends = [
        end for one in intervals for end in (one.value, one.low, one.high) if end is not None
    ]  # fmt: skip
    left = _name_width(one.name for one in intervals)
    across = Scale(ends, left, WIDTH - RIGHT)
    height = TOP + 24 * len(intervals)
    body = [*_ticks_across(across, across.ticks(), height, form)]
    for row, one in enumerate(intervals):
        y = TOP + 24 * row + 12
        colour = COLOURS[row % len(COLOURS)]
        body.append(_name(one.name, left, y))
        if one.low is not None and one.high is not None:
            body.append(
                f'<line x1="{across(one.low)}" x2="{across(one.high)}" y1="{y}" y2="{y}" '
                f'stroke="{colour}" stroke-width="3"/>'
            )
        body.append(
            f'<circle cx="{across(one.value)}" cy="{y}" r="5" fill="{colour}">'
            f"<title>{escape(one.name)}: {form(one.value)}</title></circle>"
        )
    found = "; ".join(f"{one.name} {form(one.value)}" for one in intervals)
    return _svg(title, found, body, height + BOTTOM)


def stack_plot(title: str, stacks: Sequence[StackedBar], *, mark: str, form: NumberFormat) -> str:
    """Plot each stack of parts in a row. The mark is a line across the row."""
    kinds = list(dict.fromkeys(kind for stack in stacks for kind in stack.parts))
    wholes = [sum(stack.parts.values()) for stack in stacks]
    marks = [stack.mark for stack in stacks if stack.mark is not None]
    left = _name_width(stack.name for stack in stacks)
    across = Scale([0.0, *wholes, *marks], left, WIDTH - RIGHT)
    height = TOP + 26 * len(stacks)
    body = [*_ticks_across(across, across.ticks(), height, form)]
    for row, stack in enumerate(stacks):
        body += _stack_row(stack, kinds, TOP + 26 * row, left, across, mark, form)
    body += _legend(kinds, height + BOTTOM - 4, filled=True)
    found = "; ".join(f"{s.name} {form(w)}" for s, w in zip(stacks, wholes, strict=True))
    return _svg(title, found, body, height + BOTTOM + _legend_height(len(kinds)))


def _stack_row(
    stack: StackedBar,
    kinds: Sequence[str],
    y: float,
    left: float,
    across: Scale,
    mark: str,
    form: NumberFormat,
) -> Iterator[str]:
    yield _name(stack.name, left, y + 13)
    before = 0.0
    for kind, size in stack.parts.items():
        start, before = across(before), before + size
        yield (
            f'<rect x="{start}" y="{y + 4}" width="{round(across(before) - start, 2)}" '
            f'height="18" fill="{COLOURS[kinds.index(kind) % len(COLOURS)]}">'
            f"<title>{escape(stack.name)}, {escape(kind)}: {form(size)}</title></rect>"
        )
    if stack.mark is not None:
        at = across(stack.mark)
        yield (
            f'<line x1="{at}" x2="{at}" y1="{y}" y2="{y + 26}" stroke="currentColor" '
            f'stroke-width="2.5"><title>{escape(stack.name)}, {escape(mark)}: '
            f"{form(stack.mark)}</title></line>"
        )


def _svg(title: str, description: str, body: Sequence[str], height: float) -> str:
    return "\n".join(
        [
            f'<svg role="img" viewBox="0 0 {WIDTH} {height}" xmlns="http://www.w3.org/2000/svg">',
            f"<title>{escape(title)}</title>",
            f"<desc>{escape(description)}</desc>",
            *body,
            "</svg>",
        ]
    )


def _axes(
    across: Scale, up: Scale, ticks: Sequence[float], form: NumberFormat, *, x: str, y: str
) -> Iterator[str]:
    yield from _ticks_across(across, ticks, HEIGHT - BOTTOM, form)
    for tick in up.ticks():
        place = up(tick)
        yield f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{place}" y2="{place}" class="grid"/>'
        yield f'<text x="{LEFT - 6}" y="{place + 4}" text-anchor="end">{tick:g}</text>'
    yield f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x)}</text>'
    middle = (HEIGHT - BOTTOM + TOP) / 2
    yield (
        f'<text x="14" y="{middle}" text-anchor="middle" transform="rotate(-90 14 {middle})">'
        f"{escape(y)}</text>"
    )


def _ticks_across(
    across: Scale, ticks: Sequence[float], bottom: float, form: NumberFormat
) -> Iterator[str]:
    for tick in ticks:
        place = across(tick)
        yield f'<line x1="{place}" x2="{place}" y1="{TOP}" y2="{bottom}" class="grid"/>'
        yield f'<text x="{place}" y="{bottom + 16}" text-anchor="middle">{form(tick)}</text>'


def _legend(names: Sequence[str], top: float, *, filled: bool = False) -> Iterator[str]:
    for number, name in enumerate(names):
        x, y = LEFT + (number % 2) * (WIDTH - LEFT) / 2, top + 14 + 18 * (number // 2)
        colour = COLOURS[number % len(COLOURS)]
        if filled:
            yield f'<rect x="{x}" y="{y - 10}" width="24" height="11" fill="{colour}"/>'
        else:
            line = f'x1="{x}" x2="{x + 24}" y1="{y - 4}" y2="{y - 4}"'
            yield f'<line {line} {_stroke(number)} stroke-width="2.5"/>'
        yield f'<text x="{x + 30}" y="{y}">{escape(name)}</text>'


def _legend_height(number: int) -> int:
    return 18 * (-(-number // 2)) + 16


def _stroke(number: int) -> str:
    dash = DASHES[number // len(COLOURS) % len(DASHES)]
    return f'stroke="{COLOURS[number % len(COLOURS)]}" stroke-dasharray="{dash}"'


def _fill(number: int) -> str:
    return f'fill="{COLOURS[number % len(COLOURS)]}"'


def _name_width(names: Iterator[str]) -> float:
    return min(WIDTH / 2, 16 + 7.2 * max(map(len, names)))


def _name(name: str, left: float, y: float) -> str:
    return f'<text x="{left - 8}" y="{y + 4}" text-anchor="end">{escape(name)}</text>'
