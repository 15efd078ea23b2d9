"""Text pieces that reports share: sizes, durations, shares, intervals, tables."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

MIB, GIB = 2**20, 2**30

_MAX_SHOWN = 60
"""Characters of a wrong value that a message repeats."""


def shortened(text: str) -> str:
    """Return a text in one line, cut after 60 characters."""
    line = " ".join(text.split())
    return line if len(line) <= _MAX_SHOWN else f"{line[:_MAX_SHOWN]}..."


def value_text(value: object) -> str:
    """Format a value for an error message, as YAML: text is quoted, and nothing else is."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, str):
        return f'"{shortened(value)}"'
    return shortened(str(value))


def did_you_mean(text: str, options: Collection[str]) -> str:
    """Return the most similar of some options as a question, with a space before; "" if none is."""
    near = get_close_matches(text.casefold(), [one.casefold() for one in options], n=1)
    found = [one for one in options if one.casefold() in near]
    return f" (did you mean {found[0]}?)" if found else ""


def first_names(names: Collection[str], number: int) -> str:
    """Join the first names, and count the others: `a, b and 3 more`."""
    shown = ", ".join(list(names)[:number])
    return f"{shown} and {len(names) - number:,} more" if len(names) > number else shown


def size_text(size: float) -> str:
    """Format bytes in GiB, or in MiB below one GiB."""
    return f"{size / GIB:,.2f} GiB" if abs(size) >= GIB else f"{size / MIB:,.1f} MiB"


def duration_text(seconds: float) -> str:
    """Format seconds in the largest unit that gives a number of at least 2.

    Less than a second is said in words: rounded, it would be 0 or 1.
    """
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 1 else _UNDER_A_SECOND


_UNDER_A_SECOND = "under a second"


def duration_range_text(low: float, high: float) -> str:
    """Format a range of seconds; one duration if both ends read the same."""
    least, most = duration_text(low), duration_text(high)
    if least == most:
        return least if least == _UNDER_A_SECOND else f"about {least}"
    return f"up to about {most}" if least == _UNDER_A_SECOND else f"about {least} to {most}"


def age_text(seconds: float) -> str:
    """Format how long ago something was."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit} ago"
    return "just now"


def percent_text(share: float, sign: str = "") -> str:
    """Format a share of 1 in percent.

    Args:
        sign: "+" also marks positive numbers.
    """
    return f"{100 * share:{sign}.1f}%"


def number_text(value: float, sign: str = "") -> str:
    """Format a measured value: four decimals, one from 100 on, an exponent from 1e12 on."""
    if abs(value) >= 1e12:
        return f"{value:{sign}.4g}"
    return f"{value:{sign}.4f}" if abs(value) < 100 else f"{value:{sign},.1f}"


def interval_text(estimate: Mapping[str, Any], *, is_share: bool, sign: str = "") -> str:
    """Format a value with its confidence interval, if it has one.

    Args:
        estimate: {"value", "low", "high"}; value None stands for a number that is not finite.
        is_share: format it in percent.
    """
    form = percent_text if is_share else number_text
    value, low, high = (estimate[key] for key in ("value", "low", "high"))
    if value is None:
        return "not finite"
    interval = "" if low is None or high is None else f" [{form(low, sign)}, {form(high, sign)}]"
    return f"{form(value, sign)}{interval}"


def agreement_text(*, kl: float, top1_agreement: float) -> str:
    """Format how close two models are.

    Args:
        kl: mean KL divergence, in nats per token.
        top1_agreement: share of positions with the same most likely next token.
    """
    return f"same next token at {top1_agreement:.1%} of positions, KL {kl:.1e} nats per token"


def align_table(rows: Sequence[Sequence[str]], *, left: int | None = None) -> list[str]:
    """Align the columns of a table and return its lines.

    Args:
        rows: the first one is the head.
        left: the first `left` columns are flush left, and so is a column without a head; all
            others are flush right. By default all are flush left.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    is_left = [left is None or i < left or not rows[0][i] for i in range(len(widths))]
    return [
        "  ".join(
            cell.ljust(width) if flush_left else cell.rjust(width)
            for cell, width, flush_left in zip(row, widths, is_left, strict=True)
        ).rstrip()
        for row in rows
    ]
