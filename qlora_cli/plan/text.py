"""A plan as text for people. For programs there is `--json`."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any

from qlora_cli.common.formatting import align_table, duration_text, size_text


def plan_text(report: Mapping[str, Any]) -> str:
    """What a recipe takes, and whether it fits (`report` as `plan` returns it)."""
    peak, process, device = report["peak"], report["process"], report["device"]
    lines = [
        _model_line(report),
        _rows_line(report["rows"]),
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
        f"tensors {size_text(peak['bytes'])}; with all else that the process takes "
        f"{size_text(process['low'])} to {size_text(process['high'])}",
        _verdict(report),
        *_changes(report),
        f"adapter on disk {size_text(report['adapter_bytes'])}, a checkpoint "
        f"{size_text(report['checkpoint_bytes'])}",
        *_host(report["host"]),
        *_work(report),
        _method(report),
    ]
    return "\n".join(lines)


def table_text(report: Mapping[str, Any]) -> str:
    """A row for each method, a column for each length (`report` as `plan_table` returns it)."""
    marks = {"yes": "", "perhaps": " ?", "no": " -", "unknown": ""}
    lengths = list(next(iter(report["methods"].values())))
    rows = [["tokens per row", *(f"{length:,}" for length in lengths)]]
    for method, cells in report["methods"].items():
        sizes = (
            "~" * cell["is_by_formula"] + size_text(cell["tensors"]) + marks[cell["verdict"]]
            for cell in cells.values()
        )
        rows.append([method, *sizes])
    lines = align_table(rows)
    device = report["device"]
    head = f"{report['model']['path']}: tensors at the peak; on {device['name']}, ? may fit, - not"
    if why := report["untraced"]:
        lines.append(f"~ partly by a formula, as the model cannot be traced: {why}")
    return "\n".join([head, *lines])


def _model_line(report: Mapping[str, Any]) -> str:
    model = report["model"]
    quantization = report["quantization"]
    twice = ", its constants too (double quantization)" if quantization.get("double_quant") else ""
    held = "" if quantization["type"] == "none" else f"; held in {quantization['type']}{twice}"
    return (
        f"{model['path']}: {model['weights']:,} weights ({model['dimensions']}){held}; trained "
        f"{model['trained']:,} ({model['trained_share']:.2%})"
    )


def _rows_line(rows: Mapping[str, Any]) -> str:
    largest = dict.fromkeys((h, w) for step in rows["micro_batches"] for h, w in step)
    shapes = ", ".join(f"{height} x {width}" for height, width in largest)
    steps = "" if rows["steps"] is None else f"; {rows['steps']:,} steps, {rows['tokens']:,} tokens"
    return f"largest micro-batches: {shapes} tokens (from {rows['from']}){steps}"


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
    """When it is, and whether it was traced; that of loading and evaluating goes without saying."""
    words = {"between": "between backward and update", "backward": "backward", "update": "update"}
    how = "partly by formula" if entry["by_formula"] else ""
    return ", ".join(filter(None, (stage, words.get(entry["during"], ""), how)))


def _verdict(report: Mapping[str, Any]) -> str:
    verdict, margin = report["fits"]["verdict"], report["fits"]["margin"]
    hint = "" if "changes" in report else " (try --fit)"
    if verdict == "unknown":
        return "fits: not known, as the memory of the device is not; name a card, or 24GiB"
    if verdict == "yes":
        return f"fits: yes, with {size_text(margin)} to spare"
    if verdict == "perhaps":
        return f"fits: perhaps; the tensors do, and what else there is may not{hint}"
    return f"fits: no, {size_text(-margin)} too little{hint}"


def _changes(report: Mapping[str, Any]) -> list[str]:
    """What --fit found."""
    if "changes" not in report:
        return []
    changes = report["changes"]
    if changes is None:
        shorter = report.get("no_shorter")
        return [
            "nothing that --fit may change makes it fit for sure; this is the least that was tried",
            *([f"rows cannot be shorter: {shorter}"] if shorter else []),
            "take a smaller model, or more memory",
        ]
    if not changes:
        return ["nothing has to change for it"]
    return ["with these changes, of which the report is:", f"  {set_line(changes)}"]


def set_line(changes: Mapping[str, Any]) -> str:
    """What to add to a command line of a shell."""
    values = {k: v if isinstance(v, str) else json.dumps(v) for k, v in changes.items()}
    return " ".join(f"--set {shlex.quote(f'{key}={value}')}" for key, value in values.items())


def _host(host: Mapping[str, int]) -> list[str]:
    if not host:
        return []
    paged, inputs = host["paged_bytes"], host["inputs_bytes"]
    more = f", {size_text(paged)} when states page" if paged else ""
    more += f", {size_text(inputs)} for inputs of layers in a step" if inputs else ""
    return [
        f"the host: {size_text(host['saving_bytes'])} while a checkpoint is saved{more}, beside "
        "Python and its libraries"
    ]


def _work(report: Mapping[str, Any]) -> list[str]:
    if report["flops"] is None:
        return [f"{report['flops_per_token']:.3g} floating-point operations a token"]
    line = f"{report['flops']:.3g} floating-point operations"
    if seconds := report["seconds_of_training"]:
        fast, slow = map(duration_text, seconds)
        rate, (low, high) = report["rate"], report["rate"]["used"]
        known = "measured here" if rate["is_measured"] else "as its maker states"
        line += (
            f"; training takes about {fast} to {slow} (at {low:.0%} to {high:.0%} of "
            f"{rate['flops'] / 1e12:,.2g} teraflops, {known})"
        )
    return [line]


def _method(report: Mapping[str, Any]) -> str:
    traced, layers = report["traced_layers"], report["layers"]
    if formula := report["formula"]:
        low, high = formula["range"]
        return (
            f"not traced: {formula['why']}; what is marked goes by a formula "
            f"({formula['source']}), of which the process' range takes {low:g} to {high:g} times; "
            f"the rest was counted, in {report['seconds']} s"
        )
    if traced == [layers]:
        return f"traced whole, {layers} layers, in {report['seconds']} s"
    some = " and ".join(map(str, traced))
    return (
        f"traced with {some} of {layers} layers, the rest multiplied (they are alike), "
        f"in {report['seconds']} s"
    )
