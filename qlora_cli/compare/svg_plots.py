"""The plots of a comparison. The values of each are also in a table of the page.

Text and lines use the colour of the page, so that they are visible on light and dark backgrounds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from typing import TypeGuard

from qlora_cli.common.svg import (
    LINE_HEIGHT,
    RIGHT,
    WIDTH,
    NumberFormat,
    Scale,
    fill_of,
    label,
    labels,
    legend,
    number_form,
    shown_labels,
    stroke_of,
    svg,
    text_width,
    tick_texts,
    ticks_across,
    wrap_text,
)

_HEIGHT = 280
"""Height of the area of points and lines."""
_TOP, _BAR = 12, 24
_NAMES = 0.42 * WIDTH
"""Maximum width of the names of rows."""
_DIGITS = 3
"""Decimals of a value outside axes."""
_FEW = 12
"""Maximum number of points that get markers."""
NOT_FINITE = "not finite"


@dataclass(frozen=True)
class LineSeries:
    """A series of points (x, y). A point whose y is not finite interrupts the line."""

    name: str
    points: Sequence[tuple[float, float | None]]


@dataclass(frozen=True)
class Interval:
    """A value and its interval. None stands for an unknown number, or one that is not finite."""

    name: str
    value: float | None
    low: float | None
    high: float | None

    @property
    def ends(self) -> tuple[float, float] | None:
        """The interval, if both of its ends are known."""
        if is_finite(self.low) and is_finite(self.high):
            return self.low, self.high
        return None


@dataclass(frozen=True)
class IntervalSeries:
    """Intervals at values of x, which no line connects."""

    name: str
    points: Sequence[tuple[float, Interval]]


@dataclass(frozen=True)
class StackedBar:
    """Stacked parts of a whole, and a separate value for the whole."""

    name: str
    parts: dict[str, float]
    mark: float | None


def is_finite(value: float | None) -> TypeGuard[float]:
    """Tell whether a value is known and finite."""
    return value is not None and math.isfinite(value)


def line_plot(
    title: str, lines: Sequence[LineSeries], *, x: str, y: str, form: NumberFormat
) -> str:
    """Plot lines, distinguished by colour and dashes. Lines with few points get markers."""
    pieces = {number: _pieces(line) for number, line in enumerate(lines)}
    points = [point for some in pieces.values() for piece in some for point in piece]
    area = _Area([p[1] for p in points], y, number_form)
    across = Scale([p[0] for p in points], area.left, WIDTH - RIGHT)
    body = [*area.drawn, *ticks_across(across, area.top, area.bottom, form)]
    for number, line in enumerate(lines):
        for piece in pieces[number]:
            places = " ".join(f"{across(a)},{area.up(b)}" for a, b in piece)
            body.append(
                f'<polyline points="{places}" {stroke_of(number)} stroke-width="1.7" fill="none">'
                f"<title>{escape(line.name)}</title></polyline>"
            )
            if len(line.points) <= _FEW or len(piece) == 1:
                body += [
                    f'<circle cx="{across(a)}" cy="{area.up(b)}" r="3.5" {fill_of(number)}>'
                    f"<title>{escape(line.name)}: {form(a, 0)}, {number_form(b, _DIGITS)}"
                    "</title></circle>"
                    for a, b in piece
                ]
    ends = "; ".join(
        f"{line.name} from {number_form(pieces[number][0][0][1], _DIGITS)} "
        f"to {number_form(pieces[number][-1][-1][1], _DIGITS)}"
        for number, line in enumerate(lines)
        if pieces[number]
    )
    return area.finish(title, f"{y} by {x}: {ends}", body, x, [line.name for line in lines])


def _pieces(line: LineSeries) -> list[list[tuple[float, float]]]:
    """Split a line where a value is not finite."""
    return [
        [(a, b) for a, b in piece if b is not None]
        for is_known, piece in groupby(line.points, lambda point: is_finite(point[1]))
        if is_known
    ]


def point_plot(
    title: str, series: Sequence[IntervalSeries], *, x: str, y: str, form: NumberFormat
) -> str:
    """Plot values with their intervals by x, at equal distances, without lines between them."""
    found = [one for each in series for _, one in each.points if is_finite(one.value)]
    area = _Area(_axis_values(found), y, form)
    values = sorted({a for each in series for a, _ in each.points})
    slot = (WIDTH - RIGHT - area.left) / max(1, len(values))
    places = {value: area.left + slot * (i + 0.5) for i, value in enumerate(values)}
    body = [*area.drawn]
    for text, middle in shown_labels([f"{value:.12g}" for value in values], list(places.values())):
        body.append(label(text, middle, area.bottom + LINE_HEIGHT, anchor="middle"))
    apart = min(14, 0.7 * slot / max(1, len(series)))
    for number, each in enumerate(series):
        shift = (number - (len(series) - 1) / 2) * apart
        for a, one in each.points:
            at = round(places[a] + shift, 2)
            if ends := one.ends:
                low, high = (area.up(end) for end in ends)
                body.append(_bar(at, low, at, high, number))
            if is_finite(one.value):
                name = f"{each.name}, {x}={a:.12g}"
                body.append(_dot(name, at, area.up(one.value), _words(one, form), number))
    told = "; ".join(
        f"{each.name}, {x}={a:.12g}: {_words(one, form)}"
        for each in series
        for a, one in each.points
    )
    return area.finish(title, told, body, x, [each.name for each in series])


def _axis_values(intervals: Iterable[Interval]) -> list[float]:
    """Return what an axis must show: all intervals, or zero if there are none.

    Without an interval, an axis that begins near the values would make chance look like an effect.
    """
    intervals = list(intervals)
    ends = [end for one in intervals if one.ends for end in one.ends]
    values = [one.value for one in intervals if one.value is not None]
    return [*values, *(ends or [0.0])]


def _words(one: Interval, form: NumberFormat) -> str:
    value = form(one.value, _DIGITS) if is_finite(one.value) else NOT_FINITE
    if one.ends:
        low, high = (form(end, _DIGITS) for end in one.ends)
        return f"{value} [{low}, {high}]"
    return value


def _dot(name: str, x: float, y: float, words: str, number: int) -> str:
    title = f"<title>{escape(name)}: {words}</title>"
    return f'<circle cx="{x}" cy="{y}" r="4.5" {fill_of(number)}>{title}</circle>'


def _bar(x1: float, y1: float, x2: float, y2: float, number: int) -> str:
    place = f'x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}"'
    return f'<line {place} {stroke_of(number)} stroke-width="3"/>'


class _Area:
    """The area of a plot with a vertical axis: the axis, its title above it, and the legend."""

    def __init__(self, values: Sequence[float], y: str, form: NumberFormat):
        title = wrap_text(y, WIDTH)
        self.top = LINE_HEIGHT * len(title) + _TOP
        self.bottom = self.top + _HEIGHT
        self.up = Scale(values, self.bottom, self.top)
        ticks = self.up.ticks()
        texts = tick_texts(ticks, form)
        self.left = max(map(text_width, texts), default=0) + 10
        self.drawn = [*labels(title, 0, LINE_HEIGHT - 1)]
        for tick, text in zip(ticks, texts, strict=True):
            place = self.up(tick)
            self.drawn += [
                f'<line x1="{self.left}" x2="{WIDTH - RIGHT}" y1="{place}" y2="{place}" '
                'class="grid"/>',
                label(text, self.left - 6, place + 4, anchor="end"),
            ]

    def finish(
        self, title: str, description: str, body: list[str], x: str, names: Sequence[str]
    ) -> str:
        """Add the title of the horizontal axis, and a legend."""
        below = wrap_text(x, WIDTH)
        y = self.bottom + 2 * LINE_HEIGHT + 4
        body += labels(below, WIDTH / 2, y, anchor="middle")
        keys, height = legend(names, y + LINE_HEIGHT * (len(below) - 1) + 4)
        bottom = y + LINE_HEIGHT * (len(below) - 1) + 4 + height
        return svg(title, description, [*body, *keys], bottom)


class _Rows:
    """Rows below each other, each with a name to the left that is wrapped if need be."""

    def __init__(self, names: Sequence[str]):
        lines = [wrap_text(name, _NAMES) for name in names]
        self.left = max((text_width(one) for some in lines for one in some), default=0) + 14
        self.middles: list[float] = []
        self.names: list[str] = []
        y = float(_TOP)
        for some in lines:
            height = max(_BAR, LINE_HEIGHT * len(some) + 8)
            self.middles.append(y + height / 2)
            first = y + height / 2 + 4 - LINE_HEIGHT * (len(some) - 1) / 2
            self.names += labels(some, self.left - 8, first, anchor="end")
            y += height
        self.bottom = y


def interval_plot(title: str, intervals: Sequence[Interval], *, form: NumberFormat) -> str:
    """Plot each value as a point with its interval as a bar, one per row."""
    rows = _Rows([one.name for one in intervals])
    known = [one for one in intervals if is_finite(one.value)]
    across = Scale(_axis_values(known), rows.left + 5, WIDTH - RIGHT)
    body = [*rows.names, *ticks_across(across, _TOP, rows.bottom, form)]
    for number, (y, one) in enumerate(zip(rows.middles, intervals, strict=True)):
        if ends := one.ends:
            low, high = (across(end) for end in ends)
            body.append(_bar(low, y, high, y, number))
        if is_finite(one.value):
            body.append(_dot(one.name, across(one.value), y, _words(one, form), number))
        else:
            body.append(label(NOT_FINITE, rows.left, y + 4))
    found = "; ".join(f"{one.name} {_words(one, form)}" for one in intervals)
    return svg(title, found, body, rows.bottom + LINE_HEIGHT + 8)


def stack_plot(title: str, stacks: Sequence[StackedBar], *, mark: str, form: NumberFormat) -> str:
    """Plot each stack of parts in a row. The mark is a line across the row."""
    kinds = list(dict.fromkeys(kind for stack in stacks for kind in stack.parts))
    wholes = [sum(stack.parts.values()) for stack in stacks]
    marks = [stack.mark for stack in stacks if stack.mark is not None]
    rows = _Rows([stack.name for stack in stacks])
    across = Scale([0.0, *wholes, *marks], rows.left, WIDTH - RIGHT)
    body = [*rows.names, *ticks_across(across, _TOP, rows.bottom, form)]
    for y, stack in zip(rows.middles, stacks, strict=True):
        body += _stack_row(stack, kinds, y, across, mark, form)
    keys, height = legend(kinds, rows.bottom + LINE_HEIGHT + 4, filled=True)
    found = "; ".join(f"{s.name} {form(w, 1)}" for s, w in zip(stacks, wholes, strict=True))
    return svg(title, found, [*body, *keys], rows.bottom + LINE_HEIGHT + 4 + height)


def _stack_row(
    stack: StackedBar,
    kinds: Sequence[str],
    y: float,
    across: Scale,
    mark: str,
    form: NumberFormat,
) -> Iterator[str]:
    before = 0.0
    for kind, size in stack.parts.items():
        start, before = across(before), before + size
        yield (
            f'<rect x="{start}" y="{y - 9}" width="{round(across(before) - start, 2)}" '
            f'height="18" {fill_of(kinds.index(kind))}>'
            f"<title>{escape(stack.name)}, {escape(kind)}: {form(size, 1)}</title></rect>"
        )
    if stack.mark is not None:
        at = across(stack.mark)
        yield (
            f'<line x1="{at}" x2="{at}" y1="{y - 12}" y2="{y + 12}" stroke="currentColor" '
            f'stroke-width="2.5"><title>{escape(stack.name)}, {escape(mark)}: '
            f"{form(stack.mark, 1)}</title></line>"
        )
