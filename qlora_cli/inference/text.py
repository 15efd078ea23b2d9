"""Reports of batch generation as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def generate_text(report: Mapping[str, Any]) -> str:
    """What was answered (`report` as `generate` returns it)."""
    cut = report["unfinished"]
    return (
        f"{report['output']}: {report['prompts']} answers of {report['model']}, "
        f"{report['tokens']:,} tokens in {report['seconds']:.1f} s"
        + (f"; {cut} were cut off (--max-new-tokens)" if cut else "")
    )
