"""The report of a merge: in merge.json, with `--json`, and as text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qlora_cli.common.formatting import agreement_text, percent_text, size_text
from qlora_cli.common.report import ABSENT, Absent, Report


@dataclass(frozen=True, slots=True)
class UpdateReport(Report):
    """Changes of the weights by a merge. Errors are norms over all updated weights, relative to
    the norm of the update."""

    updated: int
    """Weights with an update that is not zero."""
    untrained: int
    """Weights that could have been trained, and whose update is zero."""
    requantized: int
    """Weights without an update, written with the values that they had in quantized form."""
    copied: int
    """Weights copied from the base bit for bit."""
    norm: float
    """Norm of the whole update."""
    rounding_error: float
    """Error from rounding to the dtype of the files."""
    quantization_error: float | None
    """Distance of the base as quantized from the base's files. Null without quantization."""


@dataclass(frozen=True, slots=True)
class BaseChoiceReport(Report):
    """How close a merge into one of the bases is to the model as trained."""

    kl: float
    """Mean KL divergence from the model as trained, in nats per token."""
    top1_agreement: float
    """Share of positions with the same most likely next token."""
    loss: float | None
    """Mean loss per supervised token. Null if no token is supervised."""


@dataclass(frozen=True, slots=True)
class ComparisonReport(Report):
    """The possible bases, compared with the model as trained: quantized, in the run's precision."""

    rows: int
    """Texts that were compared."""
    tokens: int
    """Tokens that were compared."""
    held_out: bool
    """True: rows of the evaluation set. False: a few fixed texts."""
    held_out_rows: int | None
    """Rows of the evaluation set. Only its first `rows` are compared, so that losses may differ
    from those of `qlora eval`. Null for fixed texts."""
    trained_loss: float | None
    """Loss of the model as trained, per supervised token."""
    choices: Mapping[str, BaseChoiceReport]
    """For each `--base`. The chosen one is measured as written, the other before rounding."""


@dataclass(frozen=True, slots=True)
class MergeReport(Report):
    """Output of `qlora merge`, and how close it is to base plus adapter."""

    output: str
    """The folder that was written."""
    weights: str
    """Weights of the run that were merged: `last` or `best`."""
    base: str
    """The weights that the update was added to: `as-trained` or `original`."""
    dtype: str
    """Dtype of most of the written values."""
    bytes: int
    """Size of the written weights."""
    update: UpdateReport
    """Changes of the weights."""
    logit_error: float | None
    """Largest difference of a logit from base plus adapter in float32, relative to the largest
    logit. Null if logits were not compared; so are the next two."""
    kl: float | None
    """Mean KL divergence from base plus adapter in float32, in nats per token."""
    top1_agreement: float | None
    """Share of positions with the same most likely next token as base plus adapter."""
    comparison: ComparisonReport | None
    """The bases to choose from, compared with the model as trained. Null if logits were not
    compared."""
    labels: list[str] | Absent = ABSENT
    """Labels of a head that scores rows, whose outputs take the place of logits; left out for a
    model that predicts tokens."""


def merge_text(report: MergeReport) -> str:
    """Say what was written and what it means, then the figures."""
    update, comparison = report.update, report.comparison
    lines = [f"{report.output}: {size_text(report.bytes)} in {report.dtype}, base {report.base}"]
    if comparison is None:
        lines.append("logits were not compared; each weight was")
    else:
        assert report.kl is not None
        assert report.top1_agreement is not None
        agreement = agreement_text(kl=report.kl, top1_agreement=report.top1_agreement)
        if report.labels is not ABSENT:
            assert report.logit_error is not None
            agreement = f"outputs of the head differ by {report.logit_error:.1e} of the largest"
        lines.append(f"against base plus adapter: {agreement}")
    lines += [
        f"{update.updated} weights updated, {update.copied} copied; rounding error "
        f"{percent_text(update.rounding_error)} of the update",
        *_quantization(report),
    ]
    choices = comparison.choices.items() if comparison and report.labels is ABSENT else ()
    for name, choice in choices:
        assert comparison is not None
        line = f"--base {name} on {_texts(comparison)}: "
        line += f"KL from the model as trained {choice.kl:.1e}"
        if choice.loss is not None:
            line += f", loss {choice.loss:.4f} (as trained {comparison.trained_loss:.4f})"
        lines.append(line)
    return "\n".join(lines)


def _texts(comparison: ComparisonReport) -> str:
    """Name the texts of a comparison."""
    which = f"{comparison.rows:,} fixed texts"
    if comparison.held_out_rows is not None:
        which = f"{comparison.rows:,} of {comparison.held_out_rows:,} held-out rows"
    return f"{which} ({comparison.tokens:,} tokens)"


def _quantization(report: MergeReport) -> list[str]:
    """Say what the quantization of the base means for this merge."""
    error = report.update.quantization_error
    if error is None:
        return []
    size = f"{error:.1f} times" if error >= 1 else f"{error:.0%} of"
    if report.base == "as-trained":
        return [
            "the update is added to the quantized base that it was trained on, as it should be; "
            f"that base differs from the original weights by {size} the update, which is normal"
        ]
    return [
        "the update is added to the original weights, and was trained on the quantized ones, which "
        f"differ from them by {size} the update: compare the losses below"
    ]
