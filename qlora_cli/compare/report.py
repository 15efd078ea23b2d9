"""The report of `qlora compare`. Sizes are in bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from qlora_cli.common.report import ABSENT, Absent, Report
from qlora_cli.evaluate.bootstrap import Estimate
from qlora_cli.evaluate.report import MeasureInfo

Status = Literal["finished", "failed", "pruned", "waiting"]


@dataclass(frozen=True, slots=True)
class CellFailure(Report):
    """Reason of a failure."""

    error: str
    """The error."""
    hint: str | None
    """Advice; null if there is none."""


@dataclass(frozen=True, slots=True)
class CellMemory(Report):
    """Memory of a cell, as planned and as measured. Null where it is unknown."""

    planned_tensor_bytes: int | None
    """Planned peak of all tensors."""
    planned_process_bytes: tuple[int, int] | None
    """Planned memory of the process: lower and upper end."""
    planned_kinds: Mapping[str, int] | None
    """Purpose -> bytes of tensors at the planned peak."""
    plan_error: str | None
    """Why the cell could not be planned; null if it was."""
    measured_bytes: int | None
    """Peak of the process; of the tensors on a GPU."""
    measured_tensor_bytes: int | None
    """Tensors of the largest batches, which are tried before the first step."""


@dataclass(frozen=True, slots=True)
class Latency(Report):
    """Generation speed of a model: one prompt, greedy. Medians of several runs."""

    first_token_seconds: float | Absent = ABSENT
    """Time to the first token."""
    tokens_per_second: float | Absent = ABSENT
    """Tokens per second after the first."""
    error: str | Absent = ABSENT
    """Why the merge was refused or nothing could be generated, in place of the other keys."""


@dataclass(frozen=True, slots=True)
class CellGeneration(Report):
    """Generation speed of three forms of a cell's model."""

    base: Latency
    """The base, as the cell quantizes it."""
    tuned: Latency
    """The base with the adapter."""
    merged: Latency
    """The merged model."""


@dataclass(frozen=True, slots=True)
class LossPoint(Report):
    """A logged step of a training."""

    step: int
    """Number of the step."""
    tokens: int
    """Tokens up to this step."""
    seconds: float
    """Time of training up to this step, without evaluations."""
    loss: float
    """Training loss."""


@dataclass(frozen=True, slots=True)
class CellReport(Report):
    """One cell: its run and its measures. Null where a value is unknown."""

    name: str
    """Name of the cell."""
    recipe: str
    """Name of its recipe."""
    method: str | None
    """Its method from `--methods`; null without."""
    settings: Mapping[str, str]
    """Varied key -> its value in this cell."""
    status: Status
    """`waiting` if the cell is not finished."""
    failure: CellFailure | None
    """Why it failed or was pruned; null if it did not fail."""
    run: str | None
    """Its run folder."""
    trained_weights: int | None
    """Number of trained weights."""
    total_weights: int | None
    """Number of all weights."""
    trained_share: float | None
    """Share of trained weights in all weights."""
    steps: int | None
    """Steps of the run."""
    tokens: int | None
    """Tokens of all steps."""
    seconds: float | None
    """Time of training."""
    tokens_per_second: float | None
    """Median training speed of the logged steps without the first."""
    weights_bytes: int | None
    """Size of the weights in the run's last folder."""
    run_bytes: int | None
    """Size of the run folder."""
    memory: CellMemory
    """Memory, as planned and as measured."""
    generation: CellGeneration | None
    """Generation speed; null with `--no-generation`."""
    results: Mapping[str, Estimate] | None
    """Measure -> its estimate."""
    differences: Mapping[str, Estimate] | None
    """Measure -> this cell minus the first one, paired; null for the first."""
    base: str | None
    """Name of its base in `bases`."""
    from_base: Mapping[str, Estimate] | None
    """Measure -> this cell minus its base, paired."""
    curve: Sequence[LossPoint]
    """Losses of the logged steps."""


@dataclass(frozen=True, slots=True)
class CompareReport(Report):
    """Runs of a grid on the same data. DIR/comparison.json has the same."""

    folder: str
    """Folder of the comparison."""
    first: str | None
    """The cell with which the others are compared; null before one is evaluated."""
    varied: Sequence[str]
    """Keys that differ between the cells."""
    measures: Mapping[str, MeasureInfo]
    """Measure -> how to read it."""
    bases: Mapping[str, Mapping[str, Estimate]]
    """Untrained model, as some cells quantize it, then measure, then its estimate."""
    confidence: float
    """Confidence level of the intervals."""
    resamples: int
    """Number of bootstrap resamples."""
    environment: Mapping[str, Any]
    """Versions, hardware and git commit."""
    cells: Sequence[CellReport]
    """The cells, in the order of the grid."""
