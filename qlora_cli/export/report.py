"""The report of `qlora export`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qlora_cli.common.report import Report


@dataclass(frozen=True, slots=True)
class GgufCheck(Report):
    """Output of llama.cpp with a GGUF file, compared with the model folder in float32."""

    tokens: int
    """Tokens that were compared; their ids are equal."""
    kl: float
    """Mean KL divergence from the folder, in nats per token."""
    top1_agreement: float
    """Share of positions with the same most likely next token."""
    stop_tokens_missing: Sequence[int]
    """Token ids that end an answer of the model, and at which llama.cpp does not stop."""


@dataclass(frozen=True, slots=True)
class GgufFile(Report):
    """A GGUF file that was written."""

    path: str
    """The file."""
    kind: str
    """Its kind, such as `q8_0`."""
    bytes: int
    """Its size."""
    seconds: float
    """Time that it took to write."""
    check: GgufCheck | None
    """The comparison with the folder. Null if llama-cpp-python is not installed."""


@dataclass(frozen=True, slots=True)
class TrainedAgreement(Report):
    """How close a 4-bit model is to the run that it comes from (base plus adapter)."""

    kl: float
    """Mean KL divergence from base plus adapter, in nats per token."""
    top1_agreement: float
    """Share of positions with the same most likely next token."""


@dataclass(frozen=True, slots=True)
class PackedModel(Report):
    """A model folder with its weights packed into 4 bit, compared with the folder in float32."""

    path: str
    """The folder that was written."""
    bytes: int
    """Size of its weights."""
    tokens: int
    """Tokens of the fixed texts that were compared."""
    kl: float
    """Mean KL divergence from the model before packing, in nats per token."""
    top1_agreement: float
    """Share of positions with the same most likely next token."""
    trained: TrainedAgreement | None
    """The comparison with what was trained. Null without `--run`."""


@dataclass(frozen=True, slots=True)
class ExportReport(Report):
    """The files that `qlora export` wrote, each compared with the model."""

    model: str
    """The model folder that was exported."""
    gguf: Sequence[GgufFile]
    """The GGUF files."""
    bnb_4bit: PackedModel | None
    """The 4-bit model. Null without `--bnb-4bit`."""
