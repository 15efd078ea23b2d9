"""Text, scales and legends for SVG plots, without scripts, fonts or external resources.

A browser draws SVG text in one line, past the edge of the picture if need be. So every text is
measured, and wrapped or moved until it fits.
"""

from __future__ import annotations

import math
import textwrap
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from html import escape

WIDTH = 560
"""Width of every plot. On a telephone, its text is still 8 pixels high."""
RIGHT = 16
TEXT_SIZE, LINE_HEIGHT = 12, 16
COLOURS = ("#3b82c4", "#d97706", "#2e9e6b", "#c2508f", "#7c6fd6", "#8a8f1f", "#c0473c", "#4f9da6")
"""Colours of medium lightness, visible on white and on black."""
DASHES = ("none", "7 3", "2 3", "9 3 2 3")

_GAP = 8
_LARGEST, _SMALLEST_SPAN = 1e300, 1e-300
_CUT = 1e-12
"""Values closer than this share of them are drawn as equal."""

NumberFormat = Callable[[float, int], str]
"""Format a value with a number of decimals."""


def number_form(value: float, digits: int) -> str:
    """Format a number; very large and very small ones with an exponent."""
    is_small = bool(value) and abs(value) < 10.0**-digits
    if is_small or digits > 6 or abs(value) >= 1e9:
        return f"{value:.{min(max(digits, 3), 17)}g}"
    return f"{value:,.{digits}f}"


def percent_form(share: float, digits: int) -> str:
    """Format a share of 1 in percent."""
    return f"{number_form(100 * share, max(0, digits - 2))}%"


def text_width(text: str) -> float:
    """Return an upper estimate of the width of a text in a sans-serif font."""
    return sum(map(_em, text)) * TEXT_SIZE


def _em(character: str) -> float:
    if unicodedata.east_asian_width(character) in "WF":
        return 1.05
    return 0.95 if character in "mwMW@%" else 0.8 if character.isupper() else 0.62


def wrap_text(text: str, width: float) -> list[str]:
    """Break a text into lines of at most this width: between words, or else within them."""
    text = "".join(c if c.isprintable() else " " for c in text)
    for count in range(max(1, int(width / TEXT_SIZE / 0.62)), 0, -1):
        lines = textwrap.wrap(text, count)
        if all(text_width(line) <= width for line in lines):
            break
    return lines


def label(text: str, x: float, y: float, *, anchor: str = "start") -> str:
    """Draw one line of text."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def labels(lines: Sequence[str], x: float, y: float, *, anchor: str = "start") -> Iterator[str]:
    """Draw lines of text below each other, the first one at `y`."""
    for number, line in enumerate(lines):
        yield label(line, x, y + LINE_HEIGHT * number, anchor=anchor)


def shown_labels(texts: Sequence[str], places: Sequence[float]) -> Iterator[tuple[str, float]]:
    """Yield the labels of an axis, with the middle of each: within the picture, not overlapping.

    Args:
        places: where each label belongs, in ascending order.
    """
    end = -math.inf
    for text, place in zip(texts, places, strict=True):
        half = text_width(text) / 2
        middle = max(half, min(place, WIDTH - half))
        if middle - half >= end + _GAP:
            yield text, middle
            end = middle + half


class Scale:
    """Map values to positions on the page. Values that are not finite do not change the range."""

    def __init__(self, values: Sequence[float], start: float, end: float):
        finite = [_clamp(value) for value in values if math.isfinite(value)] or [0.0, 1.0]
        low, high = min(finite), max(finite)
        if high - low <= max(_SMALLEST_SPAN, _CUT * max(abs(low), abs(high))):
            margin = abs(low) / 2 if abs(low) > _SMALLEST_SPAN else 0.5
            low, high = low - margin, high + margin
        self.low, self.high = low, high
        self._start = start
        self._step = (end - start) / (high - low)

    def __call__(self, value: float) -> float:
        return round(self._start + (self._within(value) - self.low) * self._step, 2)

    def _within(self, value: float) -> float:
        return max(self.low, min(value, self.high))

    def ticks(self) -> list[float]:
        """Return some round values in the range."""
        step = 10 ** math.floor(math.log10((self.high - self.low) / 3))
        # If the logarithm was rounded up, neither factor fits.
        step *= next((m for m in (5, 2) if (self.high - self.low) / (m * step) >= 3), 1)
        first, last = math.ceil(self.low / step), math.floor(self.high / step)
        return [number * step for number in range(first, last + 1)]


def _clamp(value: float) -> float:
    return max(-_LARGEST, min(value, _LARGEST))


def tick_texts(ticks: Sequence[float], form: NumberFormat) -> list[str]:
    """Format the ticks of an axis with as many digits as tell them apart."""
    step = ticks[1] - ticks[0] if len(ticks) > 1 else 1.0
    digits = max(0, -math.floor(math.log10(step) + _CUT))
    texts: list[str] = []
    for more in range(18):
        texts = [form(tick, digits + more) for tick in ticks]
        if len(set(texts)) == len(texts):
            break
    return texts


def ticks_across(scale: Scale, top: float, bottom: float, form: NumberFormat) -> Iterator[str]:
    """Draw the grid and the labels of a horizontal axis."""
    ticks = scale.ticks()
    places = [scale(tick) for tick in ticks]
    for place in places:
        yield f'<line x1="{place}" x2="{place}" y1="{top}" y2="{bottom}" class="grid"/>'
    for text, middle in shown_labels(tick_texts(ticks, form), places):
        yield label(text, middle, bottom + LINE_HEIGHT, anchor="middle")


def legend(names: Sequence[str], top: float, *, filled: bool = False) -> tuple[list[str], float]:
    """Draw a legend in two columns, or in one if a name is too long for that.

    Returns:
        The elements, and their height.
    """
    half = WIDTH / 2
    columns = 2 if all(text_width(name) <= half - 30 - _GAP for name in names) else 1
    drawn, height = [], 8.0
    for first in range(0, len(names), columns):
        row = range(first, min(first + columns, len(names)))
        lines = [wrap_text(names[n], WIDTH / columns - 30 - _GAP) for n in row]
        y = top + height + 10
        for column, number in enumerate(row):
            x = column * half
            drawn.append(_key(number, x, y, filled=filled))
            drawn += labels(lines[column], x + 30, y)
        height += LINE_HEIGHT * max(map(len, lines)) + 4
    return drawn, height


def _key(number: int, x: float, y: float, *, filled: bool) -> str:
    if filled:
        return f'<rect x="{x}" y="{y - 10}" width="24" height="11" {fill_of(number)}/>'
    line = f'x1="{x}" x2="{x + 24}" y1="{y - 4}" y2="{y - 4}"'
    return f'<line {line} {stroke_of(number)} stroke-width="2.5"/>'


def stroke_of(number: int) -> str:
    """Return the colour and the dashes of a line, by its number."""
    dash = DASHES[number // len(COLOURS) % len(DASHES)]
    return f'stroke="{COLOURS[number % len(COLOURS)]}" stroke-dasharray="{dash}"'


def fill_of(number: int) -> str:
    """Return the colour of a shape, by its number."""
    return f'fill="{COLOURS[number % len(COLOURS)]}"'


def svg(title: str, description: str, body: Sequence[str], height: float) -> str:
    """Return a picture for an HTML page, with a title and a description for screen readers."""
    return "\n".join(
        [
            f'<svg role="img" viewBox="0 0 {WIDTH} {height:.0f}">',
            f"<title>{escape(title)}</title>",
            f"<desc>{escape(description)}</desc>",
            *body,
            "</svg>",
        ]
    )
