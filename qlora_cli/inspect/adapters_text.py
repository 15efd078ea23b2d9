"""Reports of `qlora adapters` as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qlora_cli.common.formatting import align_table, size_text

if TYPE_CHECKING:
    from qlora_cli.inspect.adapters import (
        AdapterDifference,
        AdapterList,
        AdapterReport,
        ModuleDifference,
        UpdateGroup,
    )

_BAR = 20
"""Width of the longest bar."""


def list_text(report: AdapterList) -> str:
    """Format one line for each adapter."""
    if not report.adapters:
        return f"{report.folder}: no adapters"
    rows = [["adapter", "base", "r", "alpha", "size", "steps", "best"]]
    rows += [
        [
            one.path,
            one.base,
            _or_dash(one.r),
            _or_dash(one.alpha),
            _size(one.bytes),
            _or_dash(one.steps),
            _best(one.best),
        ]
        for one in report.adapters
    ]
    return "\n".join(align_table(rows, left=2))


def inspect_text(report: AdapterReport) -> str:
    """Describe an adapter by kind of module and by layer."""
    targets = report.target_modules
    extras = ["use_rslora"] * report.use_rslora + ["use_dora"] * report.use_dora
    saved = report.modules_to_save
    lines = [
        f"{report.path}: {report.type}, r {report.r}, alpha {report.alpha:g}"
        + "".join(f", {extra}" for extra in extras),
        f"base: {report.base or 'not named'}",
        f"targets: {targets if isinstance(targets, str) else ', '.join(targets or ['not named'])}",
        *([f"trained in full: {', '.join(saved)}"] if saved else []),
        f"{report.weights:,} weights in {len(report.modules)} modules, "
        f"{_size(report.bytes)}; norm of all updates {report.norm:.4g}",
        *(["norms are of B A, without DoRA's magnitudes"] if report.use_dora else []),
        "",
        _groups("kind", report.kinds),
    ]
    if report.layers:
        lines += ["", _groups("layer", report.layers)]
    return "\n".join(lines)


def diff_text(report: AdapterDifference) -> str:
    """Format the differences of two adapters: one line for each module."""
    lines = [f"{report.first} and {report.second}"]
    lines += [f"{name}: {a} and {b}" for name, (a, b) in report.settings.items()]
    rows = [["", "cosine", "norm ratio", "distance"], _differences("all", report)]
    rows += [_differences(module.name, module) for module in report.modules]
    lines += ["", "\n".join(align_table(rows, left=1))]
    for path, only in ((report.first, report.only_first), (report.second, report.only_second)):
        if only:
            lines.append(f"only in {path}: {', '.join(only)}")
    return "\n".join(lines)


def _groups(title: str, groups: Mapping[str, UpdateGroup]) -> str:
    largest = max(group.norm for group in groups.values()) or 1.0
    rows = [[title, "modules", "norm", "largest", "effective rank", ""]]
    rows += [
        [
            name,
            str(group.modules),
            f"{group.norm:.4g}",
            f"{group.largest:.4g}",
            f"{group.effective_rank:.1f}",
            "#" * round(_BAR * group.norm / largest),
        ]
        for name, group in groups.items()
    ]
    return "\n".join(align_table(rows, left=1))


def _differences(name: str, row: ModuleDifference | AdapterDifference) -> list[str]:
    values = (row.cosine, row.norm_ratio, row.distance)
    return [name, *("-" if value is None else f"{value:.4f}" for value in values)]


def _size(size: int | None) -> str:
    return "-" if size is None else size_text(size)


def _best(best: Mapping[str, Any] | None) -> str:
    return "-" if best is None else f"{best['by']} {best['value']:.4f}"


def _or_dash(value: object) -> str:
    return "-" if value is None else str(value)
