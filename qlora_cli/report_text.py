"""Reports of commands as text for people. For programs there is `--json`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def run_text(folder: str, record: Mapping[str, Any]) -> str:
    """Where a finished run lies, and what to do with it (`record` is its run.json)."""
    lines = [f"{folder}: {record['status']} after {record['steps']} steps"]
    if record["steps"] < record["max_steps"]:
        lines[0] += f" of {record['max_steps']}: training.patience was at its end"
    if best := record.get("best"):
        lines.append(f"best {best['by']}: {best['value']:.4f} at step {best['step']}")
    next_command = f"qlora eval {folder}"
    if not record["tasks"]:
        next_command = f"qlora merge {folder} --output {folder}/merged"
    return "\n".join([*lines, f"next: {next_command}"])


def bench_text(report: Mapping[str, Any]) -> str:
    """What steps cost (`report` as `bench` returns it)."""
    speed = report["tokens_per_second"]
    return "\n".join(
        (
            f"{speed['median']:,.0f} tokens/s ({speed['least']:,.0f} to {speed['most']:,.0f} in "
            f"{report['steps'] - 1} steps after the first), kernels {report['kernels']}",
            f"{report['processor_seconds_per_1000_tokens']:.2f} processor seconds per 1,000 tokens "
            "(start and end included)",
            f"{report['peak_memory_bytes'] / 2**30:.2f} GiB at the peak",
            f"{report['seconds_to_first_step']:.1f} s to the end of the first step",
        )
    )


def rerun_text(report: Mapping[str, Any]) -> str:
    """What was different, then whether the result is (`report` as `rerun` returns it)."""
    different = report["different"].items()
    lines = [f"not as it was: {name}: {old} -> {new}" for name, (old, new) in different]
    if not lines:
        lines = ["versions, hardware, base model and rows: as they were"]
    for name, found in report["weights"].items():
        apart = found["largest_difference"]
        told = "cannot be compared" if apart is None else f"differ by up to {apart:.1e}"
        lines.append(f"{name} weights: {'the same, bit for bit' if found['is_same'] else told}")
    metrics, first = report["metrics"], report["metrics"]["first"]
    if metrics["is_same"]:
        lines.append(f"metrics: the same in all {metrics['rows']} rows")
    elif first is None:
        lines.append("metrics: other rows were logged")
    else:
        pairs = [f"{k} {pair[0]} -> {pair[1]}" for k, pair in first.items() if k != "step"]
        lines.append(f"metrics: first otherwise at step {first['step']}: {', '.join(pairs)}")
    verdict = "the same" if report["is_same"] else "NOT the same"
    return "\n".join([*lines, f"{report['again']} is {verdict} as {report['run']}"])


def evaluation_table(report: Mapping[str, Any]) -> str:
    """A row for each measure, a column for each model (`report` as `evaluate` returns it)."""
    models, measures, differences = report["models"], report["measures"], report["differences"]
    names = list(models)
    head = ["", "n", *names]
    if differences:
        head += [f"{names[1]} - {names[0]}", ""]
    rows = [head]
    for name, measure in measures.items():
        digits = _percent if measure["is_share"] else _number
        cells = [_with_interval(model[name], digits) for model in models.values()]
        if differences:
            difference = differences.get(name)
            cells.append(_with_interval(difference, digits, sign="+") if difference else "")
            cells.append(_verdict(difference, measure["lower_is_better"]) if difference else "")
        rows.append([name, f"{measure['n']:,}", *cells])
    interval = f"with {report['confidence']:.0%} intervals (bootstrap over the examples)"
    return "\n".join([f"{report['target']}: {interval}", *aligned(rows)])


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table whose columns are as wide as what is in them."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def estimate_text(estimate: Mapping[str, Any], *, is_share: bool, sign: str = "") -> str:
    """A figure with its interval."""
    return _with_interval(estimate, _percent if is_share else _number, sign)


def harness_text(report: Mapping[str, Any]) -> str:
    """A line for each metric of each task (`report` as `evaluate_by_harness` returns it)."""
    template = "with" if report["as_chat"] else "without"
    lines = [f"{report['target']}: lm-evaluation-harness {report['harness']}, {template} template"]
    for task, metrics in report["tasks"].items():
        lines += [f"{task}  {name.partition(',')[0]}  {value:g}" for name, value in metrics.items()]
    return "\n".join(lines)


def _with_interval(
    estimate: Mapping[str, Any], digits: Callable[[float, str], str], sign: str = ""
) -> str:
    value, low, high = (estimate[key] for key in ("value", "low", "high"))
    if value is None:
        return "not finite"
    interval = "" if low is None else f" [{digits(low, sign)}, {digits(high, sign)}]"
    return f"{digits(value, sign)}{interval}"


def _percent(share: float, sign: str) -> str:
    return f"{100 * share:{sign}.1f}%"


def _number(value: float, sign: str) -> str:
    return f"{value:{sign}.4f}" if abs(value) < 100 else f"{value:{sign},.1f}"


def _verdict(difference: Mapping[str, Any], lower_is_better: bool | None) -> str:
    low, high = difference["low"], difference["high"]
    if lower_is_better is None:
        return ""
    if low is None or low <= 0 <= high:
        return "no clear difference"
    return "better" if (high < 0) == lower_is_better else "worse"


def cache_text(report: Mapping[str, Any]) -> str:
    """The prepared sets that are kept, or were until now (`report` as `qlora cache --json`)."""
    sets = report["sets"]
    total = f"{len(sets)} prepared sets, {_mib(sum(one['size'] for one in sets))}"
    if report["cleared"]:
        return f"deleted {total}"
    lines = [
        f"{_mib(one['size'])}  {one['num_rows']:>9,} rows  used {_ago(time.time() - one['used'])}"
        f"  {' '.join(one['paths']) or 'unfinished'}"
        for one in sets
    ]
    return "\n".join([*lines, total])


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


def _ago(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit} ago"
    return "just now"


def merge_text(report: Mapping[str, Any]) -> str:
    """What was written, and how near it is (`report` as `merge` returns it)."""
    size = f"{report['bytes'] / 2**20:,.0f} MiB in {report['dtype']}"
    lines = [f"{report['output']}: {size}, base {report['base']}"]
    update = report["update"]
    sizes = f"rounding {update['rounding_error']:.1%} of the update"
    if (quantization := update["quantization_error"]) is not None:
        sizes += f", quantization of the base {quantization:.0%} of it"
    lines.append(f"{update['updated']} weights updated, {update['copied']} copied; {sizes}")
    if report["kl"] is None:
        return "\n".join([*lines, "logits were not compared"])
    lines.append(
        f"against base plus adapter: same next token at {report['top1_agreement']:.1%} of "
        f"positions, KL {report['kl']:.1e} nats a token"
    )
    comparison = report["comparison"]
    for name, choice in comparison["choices"].items():
        line = f"--base {name}: KL from the model as trained {choice['kl']:.1e}"
        if choice["loss"] is not None:
            line += f", loss {choice['loss']:.4f} (as trained {comparison['trained_loss']:.4f})"
        lines.append(line)
    return "\n".join(lines)


def generate_text(report: Mapping[str, Any]) -> str:
    """What was answered (`report` as `generate` returns it)."""
    cut = report["unfinished"]
    return (
        f"{report['output']}: {report['prompts']} answers of {report['model']}, "
        f"{report['tokens']:,} tokens in {report['seconds']:.1f} s"
        + (f"; {cut} were cut off (--max-new-tokens)" if cut else "")
    )


def export_text(report: Mapping[str, Any]) -> str:
    """What was written, and how near it is to the model (`report` as `export` returns it)."""
    lines = []
    for file in report["gguf"]:
        check = file["check"]
        found = (
            "not checked (llama-cpp-python is not installed)"
            if check is None
            else f"in llama.cpp: {check['tokens']} token ids equal, {_nearness(check)}"
        )
        lines.append(f"{file['path']}: {_mib(file['bytes'])}; {found}")
    if packed := report["bnb_4bit"]:
        lines.append(f"{packed['path']}: {_mib(packed['bytes'])}")
        lines.append(f"against the model before it was packed: {_nearness(packed)}")
        if trained := packed["trained"]:
            lines.append(f"against what was trained: {_nearness(trained)}")
        lines.append("nothing is lost with the base in 4 bit and the adapter beside it")
    return "\n".join(lines)


def _nearness(figures: Mapping[str, float]) -> str:
    agreement = f"{figures['top1_agreement']:.1%}"
    return f"same next token at {agreement} of positions, KL {figures['kl']:.1e} nats a token"
