"""Evaluation reports as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def harness_text(report: Mapping[str, Any]) -> str:
    """A line for each metric of each task (`report` as `evaluate_by_harness` returns it)."""
    template = "with" if report["as_chat"] else "without"
    lines = [f"{report['target']}: lm-evaluation-harness {report['harness']}, {template} template"]
    for task, metrics in report["tasks"].items():
        lines += [f"{task}  {name.partition(',')[0]}  {value:g}" for name, value in metrics.items()]
    return "\n".join(lines)
