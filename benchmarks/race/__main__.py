"""Ours against other trainers: the same base, rows, adapter and precision; one process at a time.

    python -m benchmarks.race --data FOLDER_WITH_GSM8K

Each contestant is a process that trains on the same tokens in the same order. The runs take turns
(A B A B); the first step of each does not count. Everything is read from outside of the process:
time, processor time and peak memory at each of its steps. Losses are compared with those of a plain
loop in float32. Writes race.json, and race.md made from it.
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
from benchmarks.race.contestants import CONTESTANTS, TUNED_TRL, Contestant, Kind, Sizes, named
from benchmarks.race.figures import Figures, fastest, loss_difference
from benchmarks.race.page import as_markdown
from benchmarks.race.rows import Rows, gsm8k, write
from benchmarks.race.stage import ROOT, Stage, say, versions

DEMO = "models/smollm2-135m-instruct/SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT = ["ours", "ours-lean", "trl", "trl-best"]


def main() -> None:
    options = parse()
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
        report["races"] = [
            race(stage.with_threads(number), sizes, options) for number in options.threads
        ]
        if options.growth:
            report["growth"] = grow(stage, sizes, options)
    options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    options.output.with_suffix(".md").write_text(as_markdown(report), encoding="utf-8")
    print(as_markdown(report))


def race(stage: Stage, sizes: Sizes, options: argparse.Namespace) -> dict[str, Any]:
    """One race at one number of threads."""
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
    return {
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


def judge(figures: Figures, reference: Figures, floor: Mapping[str, Any]) -> None:
    """Add how near the losses are to float32, and the speed to the floor."""
    figures["loss_difference"] = loss_difference(figures, reference)
    figures["share_of_floor"] = figures["tokens_per_second"] / floor["tokens_per_second"]


def chosen(
    stage: Stage, sizes: Sizes, options: argparse.Namespace
) -> tuple[list[Contestant], dict[str, Figures]]:
    """The contestants; for `trl-best`, heats are run first among the tuned settings of TRL."""
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
    """The first rows of GSM8K, for so many steps."""
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
    """The sweeps, at the last number of threads."""
    stage = stage.with_threads(options.threads[-1])
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
    """What was raced, where, with what."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    config = json.loads((stage.model / "config.json").read_text(encoding="utf-8"))
    return {
        "command": "python -m benchmarks.race --data FOLDER_WITH_GSM8K " + told(),
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


def told() -> str:
    """The options as given, without those that name places on this machine."""
    words = iter(sys.argv[1:])
    kept = []
    for word in words:
        if word.partition("=")[0] in PLACES:
            if "=" not in word:
                next(words)
            continue
        kept.append(f"'{word}'" if " " in word else word)
    return " ".join(kept)


PLACES = {"--data", "--model", "--environments", "--cache", "--output", "--note"}


def unpacked(model: Path) -> Path:
    """The base as a folder in bfloat16, which every contestant loads."""
    from qlora_cli.model.base import BaseModelConfig

    return BaseModelConfig(path=str(model)).locate().resolve()


def interpreters(options: argparse.Namespace) -> dict[Kind, str]:
    """The Python of each kind of contestant: our own where no environment was made for it."""
    pythons: dict[Kind, str] = {"ours": sys.executable, "plain": sys.executable}
    pythons["trl"] = sys.executable
    for kind in ("trl", "llamafactory"):
        made = options.environments and options.environments / kind / "bin" / "python"
        if made and made.exists():
            pythons[kind] = str(made)
    wanted = {CONTESTANTS[name].kind for name in options.contestants if name in CONTESTANTS}
    if missing := wanted - set(pythons):
        sys.exit(
            f"no environment for {', '.join(sorted(missing))}: make it with "
            "benchmarks/race/environments.sh FOLDER, and give --environments FOLDER"
        )
    return pythons


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.race",
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder with train.jsonl of GSM8K")
    add("--model", type=Path, default=ROOT / DEMO, help="GGUF file or folder")
    add("--environments", type=Path, help="what environments.sh made")
    add(
        "--cache",
        type=Path,
        default=Path("~/.cache/qlora/race").expanduser(),
        help="folder for the losses of the reference",
    )
    add(
        "--output",
        type=Path,
        default=ROOT / "benchmarks" / "race.json",
        help="the report; its page is written beside it",
    )
    add("--note", default="", help="what else the machine did, for the page")
    add(
        "--contestants",
        nargs="+",
        default=DEFAULT,
        help=f"of {', '.join(CONTESTANTS)}; trl-best is the best of --heats",
    )
    add(
        "--ours",
        action="append",
        default=[],
        metavar="'NAME KEY=VALUE ...'",
        help="one more of ours, with these keys of the recipe (may be given several times)",
    )
    add("--heats", nargs="+", default=TUNED_TRL, help="settings of TRL to choose the best from")
    add("--heat-steps", type=int, default=2, help="steps of a heat")
    add("--heat-limit", type=float, default=240.0, help="seconds after which a heat is stopped")
    add("--threads", type=int, nargs="+", default=[2], help="a race for each number")
    add("--steps", type=int, default=6, help="optimizer steps of a run")
    add("--warmup", type=int, default=1, help="first steps that do not count")
    add("--repetitions", type=int, default=2, help="runs of each contestant")
    add("--rows-per-step", type=int, default=16)
    add("--micro-batch", type=int, default=4, help="rows per forward")
    add("--rank", type=int, default=16, help="of the adapter; alpha is twice as much")
    add("--limit", type=float, default=900.0, help="seconds after which a run is stopped")
    add("--growth", action="store_true", help="run the sweeps too")
    add("--growth-contestants", nargs="+", default=["ours", "trl"])
    add("--lengths", type=int, nargs="*", default=[256, 512, 1024, 2048, 4096])
    add("--tokens-per-step", type=int, default=4096, help="in the sweep of lengths")
    add("--micro-batches", type=int, nargs="*", default=[1, 2, 4, 8, 16])
    add("--ranks", type=int, nargs="*", default=[8, 16, 64, 256])
    return parser.parse_args()  # fmt: skip


if __name__ == "__main__":
    main()
