"""Text pieces that several reports share: sizes, durations, intervals, tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any


def evaluation_table(report: Mapping[str, Any]) -> str:
    """A row for each measure, a column for each model (`report` as `evaluate` returns it)."""
    models, measures, differences = report["models"], report["measures"], report["differences"]
    names = list(models)
    head = ["", "n", *names]
    if differences:
        head += [f"{names[1]} - {names[0]}", ""]
    rows = [head]
    for name, measure in measures.items():
        digits = _percent if measure["is_share"] else _number
        cells = [_with_interval(model[name], digits) for model in models.values()]
        if differences:
            difference = differences.get(name)
            cells.append(_with_interval(difference, digits, sign="+") if difference else "")
            cells.append(_verdict(difference, measure["lower_is_better"]) if difference else "")
        rows.append([name, f"{measure['n']:,}", *cells])
    interval = f"with {report['confidence']:.0%} intervals (bootstrap over the examples)"
    return "\n".join([f"{report['target']}: {interval}", *aligned(rows)])


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table whose columns are as wide as what is in them."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def estimate_text(estimate: Mapping[str, Any], *, is_share: bool, sign: str = "") -> str:
    """A figure with its interval."""
    return _with_interval(estimate, _percent if is_share else _number, sign)


def _with_interval(
    estimate: Mapping[str, Any], digits: Callable[[float, str], str], sign: str = ""
) -> str:
    value, low, high = (estimate[key] for key in ("value", "low", "high"))
    if value is None:
        return "not finite"
    interval = "" if low is None else f" [{digits(low, sign)}, {digits(high, sign)}]"
    return f"{digits(value, sign)}{interval}"


def _percent(share: float, sign: str) -> str:
    return f"{100 * share:{sign}.1f}%"


def _number(value: float, sign: str) -> str:
    return f"{value:{sign}.4f}" if abs(value) < 100 else f"{value:{sign},.1f}"


def _verdict(difference: Mapping[str, Any], lower_is_better: bool | None) -> str:
    low, high = difference["low"], difference["high"]
    if lower_is_better is None:
        return ""
    if low is None or low <= 0 <= high:
        return "no clear difference"
    return "better" if (high < 0) == lower_is_better else "worse"


def mib_text(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


def age_text(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit} ago"
    return "just now"


_GIB, _MIB = 2**30, 2**20


def size_text(size: float) -> str:
    """Bytes as GiB, or as MiB where that is less."""
    return f"{size / _GIB:,.2f} GiB" if abs(size) >= _GIB else f"{size / _MIB:,.1f} MiB"


def duration_text(seconds: float) -> str:
    """Seconds in the largest unit that leaves a number of some size."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"


def merge_text(report: Mapping[str, Any]) -> str:
    """What was written, and how near it is (`report` as `merge` returns it)."""
    size = f"{report['bytes'] / 2**20:,.0f} MiB in {report['dtype']}"
    lines = [f"{report['output']}: {size}, base {report['base']}"]
    update = report["update"]
    sizes = f"rounding {update['rounding_error']:.1%} of the update"
    if (quantization := update["quantization_error"]) is not None:
        sizes += f", quantization of the base {quantization:.0%} of it"
    lines.append(f"{update['updated']} weights updated, {update['copied']} copied; {sizes}")
    if report["kl"] is None:
        return "\n".join([*lines, "logits were not compared"])
    lines.append(
        f"against base plus adapter: same next token at {report['top1_agreement']:.1%} of "
        f"positions, KL {report['kl']:.1e} nats a token"
    )
    comparison = report["comparison"]
    for name, choice in comparison["choices"].items():
        line = f"--base {name}: KL from the model as trained {choice['kl']:.1e}"
        if choice["loss"] is not None:
            line += f", loss {choice['loss']:.4f} (as trained {comparison['trained_loss']:.4f})"
        lines.append(line)
    return "\n".join(lines)


def agreement_text(figures: Mapping[str, float]) -> str:
    agreement = f"{figures['top1_agreement']:.1%}"
    return f"same next token at {agreement} of positions, KL {figures['kl']:.1e} nats a token"
