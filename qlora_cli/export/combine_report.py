"""The report of combined adapters: in run.json, with `--json`, and as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora_cli.common.report import Report
from qlora_cli.evaluate.bootstrap import Estimate
from qlora_cli.evaluate.report import MeasureInfo
from qlora_cli.runs.evaluation_table import evaluation_table


@dataclass(frozen=True, slots=True)
class ParentEvaluation(Report):
    """Evaluation of a parent and the combined adapter on the same examples."""

    target: str
    """The combined adapter."""
    models: Mapping[str, Mapping[str, Estimate]]
    """Model, then measure, then its estimate: the parent, then the combined adapter."""
    differences: Mapping[str, Estimate]
    """Measure -> combined adapter minus parent, paired."""
    measures: Mapping[str, MeasureInfo]
    """Measure -> how to read it."""
    confidence: float
    """Confidence level of the intervals."""
    resamples: int
    """Number of bootstrap resamples."""


@dataclass(frozen=True, slots=True)
class CombineReport(Report):
    """An adapter made of several. run.json keeps it as `combined`, without the evaluations."""

    output: str
    """The folder that was written."""
    adapters: Sequence[str]
    """The parents."""
    weights: Sequence[float]
    """Weight of each parent."""
    method: str
    """PEFT's method, from `--method`."""
    density: float | None
    """Share of values that the method keeps; null if it keeps all."""
    rank: int
    """Rank of the result."""
    seed: int
    """Seed of random dropping."""
    norm: float
    """Norm of all updates of the result."""
    error: float | None
    """Distance from the weighted sum of the parents' updates, relative to the norm of that sum.
    Null if that norm is zero."""
    evaluations: Sequence[ParentEvaluation]
    """Evaluation against each parent. Empty with `--no-eval`, or if the recipe has no evaluation.
    run.json keeps it as `evaluations`."""


def combine_text(report: CombineReport) -> str:
    """Describe the new adapter, and its evaluation against its parents."""
    tables = [evaluation_table(one.to_json()) for one in report.evaluations]
    made = f"{report.output}: {_sum(report, report.adapters)}"
    return "\n\n".join([f"{made}\n{_error(report)}", *tables])


def combine_card(report: CombineReport) -> str:
    """Write the README of a combined adapter. It contains no paths of the machine."""
    parents = [path.rstrip("/").rpartition("/")[2] for path in report.adapters]
    lines = [
        f"# {Path(report.output).name}",
        "",
        f"An adapter in PEFT's format, combined with `qlora`: {_sum(report, parents)}.",
        f"{_error(report).capitalize()}.",
        "",
    ]
    return "\n".join(lines)


def _sum(report: CombineReport, names: Sequence[str]) -> str:
    parts = [f"{weight:g} x {name}" for weight, name in zip(report.weights, names, strict=True)]
    return f"{' + '.join(parts)} by {report.method}, rank {report.rank}"


def _error(report: CombineReport) -> str:
    share = "unknown" if report.error is None else f"{report.error:.1%} of it"
    return f"distance from the weighted sum of the updates: {share}"
