"""Reports of batch generation and prediction as text."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qlora_cli.inference.batch import GenerationReport
    from qlora_cli.inference.predict import PredictionReport


def generate_text(report: GenerationReport) -> str:
    """Summarize a report in one line."""
    cut = report.unfinished
    return (
        f"{report.output}: {report.prompts} answers by {report.model}, "
        f"{report.tokens:,} tokens in {report.seconds:.1f} s"
        + (f"; {cut} were cut off (--max-new-tokens)" if cut else "")
    )


def predict_text(report: PredictionReport) -> str:
    """Summarize a report in one line."""
    return f"{report.output}: {report.rows:,} rows by {report.model} in {report.seconds:.1f} s" + (
        f"; {report.cut:,} were cut (data.max_length)" if report.cut else ""
    )
