"""Print a plan as text for people; `--json` is for programs."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping
from typing import Any

from qlora_cli.common.formatting import align_table, duration_text, size_text


def plan_text(report: Mapping[str, Any]) -> str:
    """Format the report of `plan`: what a recipe needs, and whether it fits."""
    peak, process, device = report["peak"], report["process"], report["device"]
    lines = [
        _verdict(report),
        _model_line(report),
        _rows_line(report["rows"]),
        *_warnings(report),
        *_auto(report),
        "",
        _head(device),
        *_stages(report),
    ]
    lines += ["", f"at the peak ({moment_text(peak['stage'], peak)}):"]
    width = max(len(kind) for kind in peak["kinds"])
    for kind, size in peak["kinds"].items():
        mark = "  by formula" if kind in peak["by_formula"] else ""
        share = size / peak["bytes"]
        lines.append(f"  {kind:<{width}}  {size_text(size):>11}  {share:>6.1%}{mark}")
    if paged := peak.get("paged_bytes"):
        lines.append(
            f"  {'paged states':<{width}}  {size_text(paged):>11}  on the card or the host"
        )
    lines += [
        "",
        f"tensors {size_text(peak['bytes'])}; the whole process "
        f"{size_text(process['low'])} to {size_text(process['high'])}",
        *_changes(report),
        f"adapter on disk {size_text(report['adapter_bytes'])}, a checkpoint "
        f"{size_text(report['checkpoint_bytes'])}",
        *_host(report["host"]),
        *_work(report),
        _method(report),
    ]
    return "\n".join(lines)


def table_text(report: Mapping[str, Any]) -> str:
    """Format the report of `plan_table`: a row per method, a column per length."""
    marks = {"yes": "", "perhaps": " ?", "no": " -", "unknown": ""}
    lengths = list(next(iter(report["methods"].values())))
    rows = [["tokens per row", *(f"{length:,}" for length in lengths)]]
    for method, cells in report["methods"].items():
        sizes = (size_text(cell["tensors"]) + marks[cell["verdict"]] for cell in cells.values())
        rows.append([method, *sizes])
    lines = align_table(rows)
    device = report["device"]
    head = f"{report['model']['path']}: peak of tensors on {device['name']}; ? may fit, - does not"
    return "\n".join([head, *lines])


def _model_line(report: Mapping[str, Any]) -> str:
    model = report["model"]
    quantization = report["quantization"]
    double = " with double quantization" if quantization.get("double_quant") else ""
    quantized = "" if quantization["type"] == "none" else f"; in {quantization['type']}{double}"
    return (
        f"{model['path']}: {model['weights']:,} weights ({model['dimensions']}){quantized}; trains "
        f"{model['trained']:,} ({model['trained_share']:.2%})"
    )


def _rows_line(rows: Mapping[str, Any]) -> str:
    largest = dict.fromkeys((h, w) for step in rows["micro_batches"] for h, w in step)
    shapes = ", ".join(f"{height} x {width}" for height, width in largest)
    steps = "" if rows["steps"] is None else f"; {rows['steps']:,} steps, {rows['tokens']:,} tokens"
    return f"largest micro-batches: {shapes} tokens (from {rows['from']}){steps}"


def _warnings(report: Mapping[str, Any]) -> list[str]:
    """Warn of settings without effect, and of rows that are longer than the model's context."""
    lines = [f"warning: {line}" for line in report["warnings"]]
    context, longest = report["context"], report["rows"]["longest"]
    if context is not None and longest > context:
        lines.append(
            f"warning: rows of up to {longest:,} tokens are longer than the model's context of "
            f"{context:,}; --set data.max_length={context} is safe"
        )
    return lines


def _auto(report: Mapping[str, Any]) -> list[str]:
    micro_batch = report["micro_batch"]
    if not micro_batch["is_auto"]:
        return []
    return [f"training.micro_batch_size: auto is {micro_batch['rows']}"]


def _head(device: Mapping[str, Any]) -> str:
    memory = "" if device["bytes"] is None else f", {size_text(device['bytes'])}"
    number = "" if device["number"] == 1 else f"{device['number']} x "
    return f"peak of each stage on {number}{device['name']}{memory}:"


def _stages(report: Mapping[str, Any]) -> list[str]:
    width = max(len(stage) for stage in report["stages"])
    return [
        f"  {stage:<{width}}  {size_text(entry['bytes']):>11}  {moment_text('', entry)}".rstrip()
        for stage, entry in report["stages"].items()
    ]


def moment_text(stage: str, entry: Mapping[str, Any]) -> str:
    """Say when a moment is, and whether it was traced. A forward pass is not named."""
    words = {"between": "between backward and update", "backward": "backward", "update": "update"}
    how = "partly by formula" if entry["by_formula"] else ""
    return ", ".join(filter(None, (stage, words.get(entry["during"], ""), how)))


def _verdict(report: Mapping[str, Any]) -> str:
    verdict, margin = report["fits"]["verdict"], report["fits"]["margin"]
    hint = "" if "changes" in report else " (try --fit)"
    if verdict == "unknown":
        return "fits: unknown, because the memory size of the device is; name a card, or 24GiB"
    if verdict == "yes":
        return f"fits: yes, with {size_text(margin)} to spare"
    if verdict == "perhaps":
        return f"fits: perhaps; the tensors fit, the whole process may not{hint}"
    return f"fits: no, {size_text(-margin)} is missing{hint}"


def _changes(report: Mapping[str, Any]) -> list[str]:
    """Format what --fit found."""
    if "changes" not in report:
        return []
    changes = report["changes"]
    if changes is None:
        shorter = report.get("no_shorter")
        return [
            "no change that --fit may make is certain to fit; this is the smallest plan tried",
            *([f"rows cannot be shorter: {shorter}"] if shorter else []),
            "use a smaller model, or more memory",
        ]
    if not changes:
        return ["it fits without changes"]
    return ["this is the report with these changes:", f"  {set_line(changes)}"]


def set_line(changes: Mapping[str, Any]) -> str:
    """Format changes as options of a shell command."""
    values = {k: v if isinstance(v, str) else json.dumps(v) for k, v in changes.items()}
    return " ".join(f"--set {shlex.quote(f'{key}={value}')}" for key, value in values.items())


def _host(host: Mapping[str, int]) -> list[str]:
    if not host:
        return []
    paged, inputs = host["paged_bytes"], host["inputs_bytes"]
    more = f", {size_text(paged)} for paged states" if paged else ""
    more += f", {size_text(inputs)} for offloaded layer inputs" if inputs else ""
    return [
        f"host: {size_text(host['saving_bytes'])} while saving a checkpoint{more}, in addition to "
        "Python and its libraries"
    ]


def _work(report: Mapping[str, Any]) -> list[str]:
    if report["flops"] is None:
        return [f"{flop_text(report['flops_per_token'])} per token"]
    line = flop_text(report["flops"])
    if seconds := report["seconds_of_training"]:
        fast, slow = map(duration_text, seconds)
        rate, (low, high) = report["rate"], report["rate"]["used"]
        known = "measured here" if rate["is_measured"] else "as published"
        line += (
            f"; training takes about {fast} to {slow} (at {low:.0%} to {high:.0%} of "
            f"{rate['flops'] / 1e12:,.2g} TFLOP/s, {known})"
        )
    return [line]


def flop_text(count: float) -> str:
    """Format a number of floating-point operations: 50.1 GFLOP."""
    power = min(6, max(0, int(math.log10(max(count, 1)) // 3)))
    return f"{count / 1000**power:.3g} {('', 'k', 'M', 'G', 'T', 'P', 'E')[power]}FLOP"


def _method(report: Mapping[str, Any]) -> str:
    traced, layers = report["traced_layers"], report["layers"]
    if traced == [layers]:
        return f"traced with all {layers} layers in {report['seconds']} s"
    some = " and ".join(map(str, traced))
    return f"traced with {some} of {layers} equal layers and extrapolated, in {report['seconds']} s"
