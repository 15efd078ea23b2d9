"""Export reports as text."""

from __future__ import annotations

from collections.abc import Iterator

from qlora_cli.common.formatting import agreement_text, size_text
from qlora_cli.export.report import ExportReport, GgufFile, PackedModel


def export_text(report: ExportReport) -> str:
    """Describe the files that were written, and how close each is to the model."""
    lines = [_gguf_line(file) for file in report.gguf]
    if report.bnb_4bit is not None:
        lines += _packed_lines(report.bnb_4bit)
    return "\n".join(lines)


def _gguf_line(file: GgufFile) -> str:
    found = "not checked (llama-cpp-python is not installed)"
    if (check := file.check) is not None:
        agreement = agreement_text(kl=check.kl, top1_agreement=check.top1_agreement)
        found = f"in llama.cpp: {check.tokens} token ids equal, {agreement}"
    return f"{file.path}: {size_text(file.bytes)}; {found}"


def _packed_lines(packed: PackedModel) -> Iterator[str]:
    yield f"{packed.path}: {size_text(packed.bytes)}"
    agreement = agreement_text(kl=packed.kl, top1_agreement=packed.top1_agreement)
    texts = f"on fixed texts ({packed.tokens:,} tokens)"
    yield f"against the model before packing, {texts}: {agreement}"
    if (trained := packed.trained) is not None:
        agreement = agreement_text(kl=trained.kl, top1_agreement=trained.top1_agreement)
        yield f"against base plus adapter as trained, {texts}: {agreement}"
    yield "serving the 4-bit base with the adapter is lossless"
