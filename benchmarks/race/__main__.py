"""Compare trainers on the same base, rows, adapter and precision, one process at a time.

    python -m benchmarks.race --data FOLDER_WITH_GSM8K

Each contestant is a process that trains on the same tokens in the same order. The runs take turns
(A B A B), and the first step of each does not count. Time, CPU time and peak memory are read from
outside of the process at each step. Losses are compared with those of a plain float32 loop. Writes
race.json and, from it, race.md. With --growth it makes short runs in many sizes instead, and writes
race_growth.json and race_growth.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.quantization_curves import processor
from benchmarks.race import growth
from benchmarks.race.contestants import Contestant, Sizes, named
from benchmarks.race.figures import Figures, fastest, loss_difference
from benchmarks.race.options import ROOT, interpreters, parse, told
from benchmarks.race.page import as_markdown
from benchmarks.race.rows import Rows, gsm8k, write
from benchmarks.race.stage import Stage, say, versions


def main() -> None:
    options = parse(sys.argv[1:], __doc__.splitlines()[0])
    sizes = Sizes(
        rows_per_step=options.rows_per_step,
        micro_batch=options.micro_batch,
        r=options.rank,
        alpha=2 * options.rank,
    )
    with tempfile.TemporaryDirectory(prefix="race-") as folder:
        stage = Stage(
            work=Path(folder),
            kept=options.cache,
            model=unpacked(options.model),
            pythons=interpreters(options),
            threads=options.threads[0],
            warmup=options.warmup,
            limit=options.limit,
        )
        report = head(stage, sizes, options)
        part, take = ("growth", grow) if options.growth else ("races", race)
        report[part] = []
        for number in options.threads:
            report[part] += take(stage.with_threads(number), sizes, options)
            # Each time: what is measured is not lost where the next is cut short.
            text = json.dumps(report, indent=1) + "\n"
            options.output.write_text(text, encoding="utf-8")
            options.output.with_suffix(".md").write_text(as_markdown(report), encoding="utf-8")
    print(as_markdown(report))


def race(stage: Stage, sizes: Sizes, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run the race at one number of threads."""
    say(f"== {stage.threads} threads")
    rows = race_rows(stage, sizes, options.data, options.steps)
    rates = [stage.rates(rows, sizes)]
    several, heats = chosen(stage, sizes, options)
    reference = stage.reference(rows, sizes)
    results = stage.in_turn(several, rows, sizes, repetitions=options.repetitions)
    rates.append(stage.rates(rows, sizes))
    floor = stage.floor(rates, rows, sizes)
    for figures in results.values():
        if "failed" not in figures:
            judge(figures, reference, floor)
    report = {
        "threads": stage.threads,
        "about": {one.name: one.about for one in several},
        "results": results,
        "heats": heats,
        "reference_losses": reference["losses"],
        "rows": {
            "steps": len(rows.lengths),
            "tokens": rows.num_tokens,
            "supervised": sum(map(sum, rows.supervised)),
            "shortest": min(map(min, rows.lengths)),
            "longest": max(map(max, rows.lengths)),
        },
        "floor": floor,
    }
    return [report]


def judge(figures: Figures, reference: Figures, floor: Mapping[str, Any]) -> None:
    """Add the loss difference from float32, and the share of the floor."""
    figures["loss_difference"] = loss_difference(figures, reference)
    figures["share_of_floor"] = figures["tokens_per_second"] / floor["tokens_per_second"]


def chosen(
    stage: Stage, sizes: Sizes, options: argparse.Namespace
) -> tuple[list[Contestant], dict[str, Figures]]:
    """Return the contestants. For `trl-best`, first run heats of TRL's tuned settings."""
    if "trl-best" not in options.contestants:
        return named(options.contestants, options.ours), {}
    rows = race_rows(stage, sizes, options.data, options.heat_steps, "heats")
    heat = replace(stage, limit=options.heat_limit, work=stage.work / "heat")
    say("-- heats")
    heats = {one.name: heat.run(one, rows, sizes) for one in named(options.heats, [])}
    best = fastest(heats)
    names = [best if name == "trl-best" else name for name in options.contestants]
    return named([name for name in names if name is not None], options.ours), heats


def race_rows(stage: Stage, sizes: Sizes, data: Path, steps: int, name: str = "rows") -> Rows:
    """Write the first rows of GSM8K, enough for `steps` steps."""
    folder = stage.work / name
    folder.mkdir(parents=True)
    return write(
        gsm8k(data, steps * sizes.rows_per_step),
        folder,
        stage.model,
        rows_per_step=sizes.rows_per_step,
        max_length=sizes.max_length,
        seed=sizes.seed,
    )


def grow(stage: Stage, sizes: Sizes, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run the sweeps at one number of threads."""
    return growth.run(
        stage,
        named(options.growth_contestants, options.ours),
        options.data,
        sizes,
        lengths=options.lengths,
        micro_batches=options.micro_batches,
        ranks=options.ranks,
        tokens_per_step=options.tokens_per_step,
    )


def head(stage: Stage, sizes: Sizes, options: argparse.Namespace) -> dict[str, Any]:
    """Describe the race: commit, model, machine and versions."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    config = json.loads((stage.model / "config.json").read_text(encoding="utf-8"))
    return {
        "command": "python -m benchmarks.race --data FOLDER_WITH_GSM8K " + told(sys.argv[1:]),
        "commit": subprocess.check_output(git, text=True).strip(),
        "processor": processor(),
        "processors": os.cpu_count(),
        "system": platform.system(),
        "model": f"{config['architectures'][0]}, {config['num_hidden_layers']} layers, "
        f"width {config['hidden_size']}",
        "note": options.note,
        "sizes": asdict(sizes),
        "warmup": options.warmup,
        "repetitions": options.repetitions,
        "versions": {
            kind: versions(python) for kind, python in stage.pythons.items() if kind != "plain"
        },
    }


def unpacked(model: Path) -> Path:
    """Return the folder of the base in bfloat16, which every contestant loads."""
    from qlora_cli.models.base import BaseModelConfig

    return BaseModelConfig(path=str(model)).locate().resolve()


if __name__ == "__main__":
    main()
