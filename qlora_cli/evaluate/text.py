"""Report of lm-evaluation-harness as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def harness_text(report: Mapping[str, Any]) -> str:
    """Format the JSON of a `HarnessReport`: one line for each metric of each task."""
    template = "with" if report["as_chat"] else "without"
    version = report["harness"]
    lines = [f"{report['target']}: lm-evaluation-harness {version}, {template} chat template"]
    for task, metrics in report["tasks"].items():
        lines += [f"{task}  {name.partition(',')[0]}  {value:g}" for name, value in metrics.items()]
    return "\n".join(lines)
