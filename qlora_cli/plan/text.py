"""Print a plan as text for people; `--json` is for programs."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qlora_cli.common.formatting import align_table, duration_range_text, size_text
from qlora_cli.common.report import ABSENT
from qlora_cli.plan.report import NO_GPU, OTHER_DEVICES, TENSORS

if TYPE_CHECKING:
    from qlora_cli.plan.report import (
        HostMemory,
        LargestRows,
        PlannedDevice,
        PlanReport,
        ProcessMemory,
        StageMemory,
        TableReport,
    )


def plan_text(report: PlanReport) -> str:
    """Format the report of `plan`: what a recipe needs, and whether it fits."""
    peak, process, device = report.peak, report.process, report.device
    lines = [
        _verdict(report),
        _model_line(report),
        _rows_line(report.rows),
        *_warnings(report),
        *_auto(report),
        "",
        _head(device),
        *_stages(report),
    ]
    lines += ["", f"at the peak ({moment_text(peak.stage, peak)}):"]
    width = max(len(kind) for kind in peak.kinds)
    for kind, size in peak.kinds.items():
        mark = "  by formula" if kind in peak.by_formula else ""
        share = size / peak.bytes
        lines.append(f"  {kind:<{width}}  {size_text(size):>11}  {share:>6.1%}{mark}")
    paged = peak.paged_bytes
    if paged is not ABSENT and paged:
        lines.append(
            f"  {'paged states':<{width}}  {size_text(paged):>11}  on the card or the host"
        )
    lines += [
        "",
        f"tensors {size_text(peak.bytes)}; the whole process "
        f"{size_text(process.low)} to {size_text(process.high)}",
        *_parts(process),
        *_changes(report),
        f"adapter on disk {size_text(report.adapter_bytes)}, a checkpoint "
        f"{size_text(report.checkpoint_bytes)}",
        *_host(report.host),
        *_work(report),
        _method(report),
    ]
    return "\n".join(lines)


def _parts(process: ProcessMemory) -> list[str]:
    """Format the parts of the process other than its tensors."""
    parts = {name: ends for name, ends in process.parts.items() if name != TENSORS}
    width = max(map(len, parts))
    return [
        f"  {name:<{width}}  {size_text(low):>11} to {size_text(high)}"
        for name, (low, high) in parts.items()
    ]


def table_text(report: TableReport) -> str:
    """Format the report of `plan_table`: a row per method, a column per length."""
    marks = {"yes": "", "perhaps": " ?", "no": " -", "unknown": ""}
    lengths = list(next(iter(report.methods.values())))
    rows = [["tokens per row", *(f"{length:,}" for length in lengths)]]
    for method, cells in report.methods.items():
        sizes = (size_text(cell.tensors) + marks[cell.verdict] for cell in cells.values())
        rows.append([method, *sizes])
    lines = align_table(rows)
    head = f"{report.model.path}: peak of tensors on {report.device.name}; ? may fit, - does not"
    if report.device.bytes is None:
        lines.append(f"what fits is unknown, because {NO_GPU}; {OTHER_DEVICES}")
    return "\n".join([head, *lines])


def _model_line(report: PlanReport) -> str:
    model, quantization = report.model, report.quantization
    double = " with double quantization" if quantization.get("double_quant") else ""
    quantized = "" if quantization["type"] == "none" else f"; in {quantization['type']}{double}"
    return (
        f"{model.path}: {model.weights:,} weights ({model.dimensions}){quantized}; trains "
        f"{model.trained:,} ({model.trained_share:.2%})"
    )


def _rows_line(rows: LargestRows) -> str:
    largest = dict.fromkeys((h, w) for step in rows.micro_batches for h, w in step)
    shapes = ", ".join(f"{height} x {width}" for height, width in largest)
    steps = "" if rows.steps is None else f"; {rows.steps:,} steps, {rows.tokens:,} tokens"
    # Where a model allows it, the rows of a micro-batch are one sequence without padding.
    is_joined = any(width > rows.longest for _, width in largest)
    joined = "rows joined without padding, " if is_joined else ""
    return f"largest micro-batches: {shapes} tokens ({joined}from {rows.from_}){steps}"


def _warnings(report: PlanReport) -> list[str]:
    """Warn of settings without effect, and of rows that are longer than the model's context."""
    lines = [f"warning: {line}" for line in report.warnings]
    context, longest = report.context, report.rows.longest
    if context is not None and longest > context:
        lines.append(
            f"warning: rows of up to {longest:,} tokens are longer than the model's context of "
            f"{context:,}; --set data.max_length={context} is safe"
        )
    return lines


def _auto(report: PlanReport) -> list[str]:
    if not report.micro_batch.is_auto:
        return []
    return [f"training.micro_batch_size: auto is {report.micro_batch.rows}"]


def _head(device: PlannedDevice) -> str:
    memory = "" if device.bytes is None else f", {size_text(device.bytes)}"
    number = "" if device.number == 1 else f"{device.number} x "
    return f"peak of each stage on {number}{device.name}{memory}:"


def _stages(report: PlanReport) -> list[str]:
    width = max(len(stage) for stage in report.stages)
    return [
        f"  {stage:<{width}}  {size_text(memory.bytes):>11}  {moment_text('', memory)}".rstrip()
        for stage, memory in report.stages.items()
    ]


def moment_text(stage: str, memory: StageMemory) -> str:
    """Say when a moment is, and whether it was traced. A forward pass is not named."""
    words = {"between": "between backward and update", "backward": "backward", "update": "update"}
    how = "partly by formula" if memory.by_formula else ""
    return ", ".join(filter(None, (stage, words.get(memory.during, ""), how)))


def _verdict(report: PlanReport) -> str:
    verdict, margin = report.fits.verdict, report.fits.margin
    hint = " (try --fit)" if report.changes is ABSENT else ""
    if margin is None:
        return f"fits: unknown, because {NO_GPU}; {OTHER_DEVICES}"
    if verdict == "yes":
        return f"fits: yes, with {size_text(margin)} to spare"
    if verdict == "perhaps":
        return f"fits: perhaps; the tensors fit, the whole process may not{hint}"
    return f"fits: no, {size_text(-margin)} is missing{hint}"


def _changes(report: PlanReport) -> list[str]:
    """Format what --fit found."""
    changes, no_shorter = report.changes, report.no_shorter
    if changes is ABSENT:
        return []
    if changes is None:
        return [
            "no change that --fit may make is certain to fit; this is the smallest plan tried",
            *([] if no_shorter is ABSENT else [f"rows cannot be shorter: {no_shorter}"]),
            "use a smaller model, or more memory",
        ]
    if not changes:
        return ["it fits without changes"]
    return ["this is the report with these changes:", f"  {set_line(changes)}"]


def set_line(changes: Mapping[str, Any]) -> str:
    """Format changes as options of a shell command."""
    values = {k: v if isinstance(v, str) else json.dumps(v) for k, v in changes.items()}
    return " ".join(f"--set {shlex.quote(f'{key}={value}')}" for key, value in values.items())


def _host(host: HostMemory) -> list[str]:
    saving, paged, inputs = host.saving_bytes, host.paged_bytes, host.inputs_bytes
    if saving is ABSENT or paged is ABSENT or inputs is ABSENT:
        return []
    more = f", {size_text(paged)} for paged states" if paged else ""
    more += f", {size_text(inputs)} for offloaded layer inputs" if inputs else ""
    return [
        f"host: {size_text(saving)} while saving a checkpoint{more}, in addition to "
        "Python and its libraries"
    ]


_ASSUMED_TOKENS = 10_000_000
"""Tokens of a run whose length is unknown, for its duration."""


def _work(report: PlanReport) -> list[str]:
    """Format the operations, the duration and the speed, of an assumed run if need be."""
    line = f"{flop_text(report.flops_per_token)} per token"
    if report.flops is not None:
        line = flop_text(report.flops)
    rate, speed, seconds = report.rate, report.tokens_per_second, report.seconds_of_training
    if speed is None or rate is ABSENT:
        return [f'{line}; for the duration, name a card, such as --device "RTX 4090"']
    (slow, fast), (low, high) = speed, rate.used
    tokens = f"{slow:,.0f} to {fast:,.0f}" if slow < fast else f"{slow:,.0f}"
    peak = rate.flops / 1e12
    known = "measured here" if rate.is_measured else "as published"
    source = f"  ({low:.0%} to {high:.0%} of {peak:,.{0 if peak >= 10 else 2}f} TFLOP/s, {known})"
    if seconds is not None:
        duration = f"training takes {duration_range_text(*seconds)}"
        return [f"{line}; {duration}, at {tokens} tokens per second", source]
    duration = duration_range_text(_ASSUMED_TOKENS / fast, _ASSUMED_TOKENS / slow)
    return [
        f"{line}; {tokens} tokens per second",
        source,
        f"{_ASSUMED_TOKENS:,} tokens take {duration} (assumed: the length of the run is unknown)",
    ]


def flop_text(count: float) -> str:
    """Format a number of floating-point operations: 50.1 GFLOP."""
    power = min(6, max(0, int(math.log10(max(count, 1)) // 3)))
    return f"{count / 1000**power:.3g} {('', 'k', 'M', 'G', 'T', 'P', 'E')[power]}FLOP"


def _method(report: PlanReport) -> str:
    traced, layers = report.traced_layers, report.layers
    if list(traced) == [layers]:
        return f"traced with all {layers} layers in {report.seconds} s"
    some = " and ".join(map(str, traced))
    return f"traced with {some} of {layers} equal layers and extrapolated, in {report.seconds} s"
