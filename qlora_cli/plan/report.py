"""The reports of `qlora plan`. Sizes are in bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from qlora_cli.common.report import Absent, Report

Verdict = Literal["yes", "perhaps", "no", "unknown"]

NO_GPU = "there is no GPU here"
"""The reason why the memory of `--device cuda` is unknown."""
OTHER_DEVICES = (
    "--device cpu is for this machine; for another one, give its memory (--device 24GiB) or "
    'the name of its card (--device "RTX 4090")'
)

TENSORS = "tensors"
"""The part of a process that is traced."""


@dataclass(frozen=True, slots=True)
class PlannedModel(Report):
    """The model, and how much of it is trained."""

    path: str
    """`model.path` of the recipe."""
    dimensions: str
    """Source of the model's dimensions: a config.json, or built-in figures."""
    weights: int
    """Number of weights of the base."""
    trained: int
    """Number of trained weights."""
    trained_share: float
    """Share of trained weights in all weights, those of the adapter included."""


@dataclass(frozen=True, slots=True)
class PlannedDevice(Report):
    """The device of the plan."""

    name: str
    """Its name."""
    number: int
    """Number of devices that train together, from `--gpus`."""
    bytes: int | None
    """Memory of one device; null if unknown."""


@dataclass(frozen=True, slots=True)
class MicroBatch(Report):
    """The micro-batch of a run."""

    rows: int
    """Number of rows."""
    is_auto: bool
    """True if the recipe has `training.micro_batch_size: auto`."""


@dataclass(frozen=True, slots=True)
class LargestRows(Report):
    """The batches that need the most memory, and the length of the run."""

    from_: str
    """Source of these figures: the data, or an assumption and the reason for it."""
    micro_batches: Sequence[Sequence[Sequence[int]]]
    """The most demanding steps; for each micro-batch its rows and tokens per row."""
    steps: int | None
    """Number of steps of the run; null if unknown."""
    tokens: int | None
    """Tokens of all steps, without padding; null if unknown."""
    longest: int
    """Tokens of the longest row."""


@dataclass(frozen=True, slots=True)
class StageMemory(Report):
    """Peak memory of a stage."""

    bytes: int
    """Memory of all tensors."""
    during: str
    """Part of a step: `forward`, `backward`, `between` (backward and update) or `update`."""
    kinds: Mapping[str, int]
    """Purpose -> bytes, the largest first."""
    by_formula: Sequence[str]
    """Kinds that are computed by a formula instead of traced."""
    paged_bytes: int | Absent
    """Optimizer states that can be on the card or the host. They are not part of `bytes`. Absent
    without a paged optimizer, and on a CPU."""


@dataclass(frozen=True, slots=True)
class PeakMemory(StageMemory):
    """The largest peak of all stages."""

    stage: str
    """Stage with this peak."""


@dataclass(frozen=True, slots=True)
class TimelineMoment(StageMemory):
    """Memory at one moment of a run."""

    stage: str
    """Stage of the run."""
    turn: int
    """Number of forward passes that have begun in the stage."""
    place: int | None
    """Position in the model: 0 before the first layer, 2i + 1 in layer i, 2i + 2 after it. Null
    after all layers in the backward pass, and in an update."""


@dataclass(frozen=True, slots=True)
class ProcessMemory(Report):
    """Memory of the whole process, as a range."""

    low: int
    """Lower end."""
    high: int
    """Upper end."""
    needed: tuple[int, int]
    """The same range without pages of the base's file on a CPU. The system takes these back when
    memory is short, so they do not have to fit."""
    parts: Mapping[str, tuple[int, int]]
    """Part of the process -> its lower and upper end. They add up to the range."""


@dataclass(frozen=True, slots=True)
class Fits(Report):
    """Comparison of the process with the memory of the device."""

    verdict: Verdict
    """`yes`: the whole range fits. `perhaps`: only its lower end. `no`: not even that."""
    margin: int | None
    """Memory of the device minus the upper end of what the process needs. Null if the former is
    unknown."""


@dataclass(frozen=True, slots=True)
class HostMemory(Report):
    """Host memory of a run on a card, in addition to Python and its libraries. Empty on a CPU."""

    saving_bytes: int | Absent
    """Copy of the optimizer's states while a checkpoint is saved."""
    paged_bytes: int | Absent
    """Optimizer states that can be paged to the host."""
    inputs_bytes: int | Absent
    """Offloaded inputs of layers."""


@dataclass(frozen=True, slots=True)
class MatmulRate(Report):
    """The rate from which speed and duration are computed."""

    flops: float
    """Matmul operations per second of one device."""
    used: tuple[float, float]
    """Shares of this rate that training reaches: small models, large models."""
    is_measured: bool
    """True if the rate was measured on this machine, false if it is the published one."""


@dataclass(frozen=True, slots=True)
class PlanReport(Report):
    """The memory and time of a recipe on a device. Sizes are in bytes."""

    model: PlannedModel
    """The model, and how much of it is trained."""
    device: PlannedDevice
    """The device."""
    rows: LargestRows
    """The batches that the plan is made with."""
    peak: PeakMemory
    """The largest peak."""
    stages: Mapping[str, StageMemory]
    """Stage of the run -> its peak."""
    timeline: Sequence[TimelineMoment]
    """Memory from loading to evaluation, in order."""
    process: ProcessMemory
    """Memory of the whole process."""
    fits: Fits
    """Comparison of the process with the memory of the device."""
    adapter_bytes: int
    """Size of the saved adapter."""
    checkpoint_bytes: int
    """Size of a checkpoint."""
    quantization: Mapping[str, Any]
    """The recipe's section `quantization`."""
    host: HostMemory
    """Host memory of a run on a card."""
    flops_per_token: float
    """Floating-point operations per token."""
    flops: float | None
    """Floating-point operations of the run; null if its length is unknown."""
    seconds_of_training: tuple[float, float] | None
    """Shortest and longest duration; null if the length of the run or the rate is unknown."""
    tokens_per_second: tuple[float, float] | None
    """Lowest and highest speed, of all devices together; null if the rate is unknown."""
    rate: MatmulRate | Absent
    """The rate from which speed and duration are computed; absent if it is unknown."""
    traced_layers: Sequence[int]
    """Numbers of layers of the traced models. If less than `layers`, the rest is extrapolated."""
    layers: int
    """Number of layers of the model."""
    no_shorter: str | Absent
    """Why `--fit` did not make rows shorter. Absent if nothing kept it from that."""
    changes: Mapping[str, Any] | Absent | None
    """Recipe key -> value that `--fit` proposes; the report describes the changed recipe. Null if
    no change is certain to fit; absent without `--fit`."""
    micro_batch: MicroBatch
    """The micro-batch."""
    context: int | None
    """Number of positions that the model was made for, less the adapter's virtual tokens; null if
    its config does not say."""
    warnings: Sequence[str]
    """Settings of the recipe that have no effect in this run, and files that are missing."""
    seconds: float
    """Time that the plan took."""


@dataclass(frozen=True, slots=True)
class TableModel(Report):
    """The model of a table."""

    path: str
    """`model.path` of the recipe."""
    dimensions: str
    """Source of the model's dimensions: a config.json, or built-in figures."""


@dataclass(frozen=True, slots=True)
class TableDevice(Report):
    """The device of a table."""

    name: str
    """Its name."""
    bytes: int | None
    """Its memory; null if unknown."""


@dataclass(frozen=True, slots=True)
class TableCell(Report):
    """Memory of one method at one row length."""

    tensors: int
    """Memory of all tensors at the peak."""
    low: int
    """Lower end of the memory of the process."""
    high: int
    """Upper end of the memory of the process."""
    verdict: Verdict
    """The verdict of a plan with this method and length."""


@dataclass(frozen=True, slots=True)
class TableReport(Report):
    """Memory of training methods for one model, at several row lengths. Sizes are in bytes."""

    model: TableModel
    """The model."""
    device: TableDevice
    """The device."""
    methods: Mapping[str, Mapping[int, TableCell]]
    """Method, then tokens per row, then its memory."""
