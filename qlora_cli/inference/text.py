"""Report of batch generation as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def generate_text(report: Mapping[str, Any]) -> str:
    """Summarize a `generate` report in one line."""
    cut = report["unfinished"]
    return (
        f"{report['output']}: {report['prompts']} answers by {report['model']}, "
        f"{report['tokens']:,} tokens in {report['seconds']:.1f} s"
        + (f"; {cut} were cut off (--max-new-tokens)" if cut else "")
    )
