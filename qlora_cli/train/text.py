"""Training, benchmark and rerun reports as text."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_cli.common.formatting import duration_text, size_text


def run_text(folder: str, record: Mapping[str, Any]) -> str:
    """Describe a finished run and the next command (`record` is its run.json)."""
    steps = f"{record['steps']:,} steps"
    if record["steps"] < record["max_steps"]:
        steps += f" of {record['max_steps']:,} (stopped early by training.patience)"
    facts = [f"{folder}: {record['status']} after {steps} and {duration_text(record['seconds'])}"]
    if skipped := record["steps_not_applied"]:
        facts.append(f"{skipped:,} of the steps not applied (loss or gradient not finite)")
    first, last = record["first_loss"], record["last_loss"]
    facts.append(f"training loss {first:.4f} in the first step, {last:.4f} in the last")
    weights = "last/"
    if best := record.get("best"):
        facts.append(f"best {best['by']} {best['value']:.4f} at step {best['step']}")
        weights += " and best/"
    facts.append(f"weights in {weights}, log in metrics.jsonl")
    return f"{'; '.join(facts)}\nnext: {_next_command(folder, record)}"


def _next_command(folder: str, record: Mapping[str, Any]) -> str:
    run = shlex.quote(folder)
    if record["tasks"]:
        return f"qlora eval {run}"
    return f"qlora merge {run} --output {shlex.quote(str(Path(folder, 'merged')))}"


def bench_text(report: Mapping[str, Any]) -> str:
    """Describe speed and memory (`report` as `bench` returns it)."""
    speed = report["tokens_per_second"]
    return "\n".join(
        (
            f"{speed['median']:,.0f} tokens/s ({speed['least']:,.0f} to {speed['most']:,.0f} in "
            f"{report['steps'] - 1} steps after the first), kernels {report['kernels']}",
            f"{report['processor_seconds_per_1000_tokens']:.2f} processor seconds per 1,000 tokens "
            "(start and end included)",
            f"{size_text(report['peak_memory_bytes'])} at the peak",
            f"{report['seconds_to_first_step']:.1f} s to the end of the first step",
        )
    )


def rerun_text(report: Mapping[str, Any]) -> str:
    """List what changed, then say if the result did (`report` as `rerun` returns it)."""
    different = report["different"].items()
    lines = [f"changed: {name}: {old} -> {new}" for name, (old, new) in different]
    if not lines:
        lines = ["versions, hardware, base model and rows: unchanged"]
    for name, found in report["weights"].items():
        apart = found["largest_difference"]
        found_text = "cannot be compared" if apart is None else f"differ by up to {apart:.1e}"
        lines.append(f"{name} weights: {'bit-identical' if found['is_same'] else found_text}")
    metrics, first = report["metrics"], report["metrics"]["first"]
    if metrics["is_same"]:
        lines.append(f"metrics: identical in all {metrics['rows']} rows")
    elif first is None:
        lines.append("metrics: different rows were logged")
    else:
        pairs = [f"{k} {pair[0]} -> {pair[1]}" for k, pair in first.items() if k != "step"]
        lines.append(f"metrics: first different at step {first['step']}: {', '.join(pairs)}")
    verdict = "identical to" if report["is_same"] else "NOT identical to"
    return "\n".join([*lines, f"{report['again']} is {verdict} {report['run']}"])
