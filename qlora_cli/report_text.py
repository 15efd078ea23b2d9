"""Reports of commands as text for people. For programs there is `--json`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any


def run_text(folder: str, record: Mapping[str, Any]) -> str:
    """Where a finished run lies, and what to do with it (`record` is its run.json)."""
    lines = [f"{folder}: {record['status']} after {record['max_steps']} steps"]
    if best := record.get("best"):
        lines.append(f"lowest evaluation loss: {best['eval_loss']:.4f} at step {best['step']}")
    return "\n".join([*lines, f"next: qlora eval {folder}"])


def evaluation_table(report: Mapping[str, Any]) -> str:
    """A column for each model, a row for each measure (`report` as `evaluate` returns it)."""
    models = report["models"]
    rows = [
        ("", list(models)),
        ("loss", [f"{model['loss']:.4f}" for model in models.values()]),
        ("perplexity", [f"{model['perplexity']:.3f}" for model in models.values()]),
    ]
    for task in next(iter(models.values()))["tasks"]:
        scores = [model["tasks"][task]["score"] for model in models.values()]
        rows.append((task, [f"{score:.1%}" for score in scores]))
    width = max(len(name) for name, _ in rows)
    table = [f"{name:<{width}}" + "".join(f"{cell:>12}" for cell in cells) for name, cells in rows]
    counts = f"{report['rows']} rows, {report['supervised_tokens']} supervised tokens"
    return "\n".join([f"{report['target']}: {counts}", *table])


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
    return (
        f"{report['output']}: {report['bytes'] / 2**20:,.0f} MiB in {report['dtype']}\n"
        f"against base plus adapter: same next token at {report['top1_agreement']:.1%} of "
        f"positions, KL {report['kl']:.1e} nats a token"
    )


def generate_text(report: Mapping[str, Any]) -> str:
    """What was answered (`report` as `generate` returns it)."""
    cut = report["unfinished"]
    return (
        f"{report['output']}: {report['prompts']} answers of {report['model']}, "
        f"{report['tokens']:,} tokens in {report['seconds']:.1f} s"
        + (f"; {cut} were cut off (--max-new-tokens)" if cut else "")
    )
