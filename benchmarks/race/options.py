"""The command line of the race."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.race.contestants import CONTESTANTS, TUNED_TRL, Kind

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "models/smollm2-135m-instruct/SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT = ["ours", "ours-lean", "trl", "trl-best"]
CACHE = Path("~/.cache/qlora/race").expanduser()

PLACES = {"--data", "--model", "--environments", "--cache", "--output", "--note"}
"""Options with local paths, and those reported elsewhere on the page."""


def parse(words: Sequence[str], about: str) -> argparse.Namespace:
    """Parse the options of a race."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.race",
        description=about,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _add_places(parser)
    _add_race(parser)
    _add_growth(parser)
    options = parser.parse_args(words)
    if options.output is None:
        name = "race_growth.json" if options.growth else "race.json"
        options.output = ROOT / "benchmarks" / name
    for size in ("rows_per_step", *(["heat_steps", "steps"] if not options.growth else [])):
        least = {"rows_per_step": options.micro_batch}.get(size, options.warmup + 1)
        if getattr(options, size) < least:
            parser.error(f"--{size.replace('_', '-')}: at least {least} with these options")
    return options


def _add_places(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder with train.jsonl of GSM8K")
    add("--model", type=Path, default=DEMO, help="GGUF file or folder")
    add("--environments", type=Path, help="folder made by environments.sh")
    add("--cache", type=Path, default=CACHE, help="cache of the reference losses")
    add("--output", type=Path, help="the report (race.json or race_growth.json in benchmarks/)")
    add("--note", default="", help="other load on the machine, for the page")


def _add_race(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    known = f"of {', '.join(CONTESTANTS)}; trl-best is the best of --heats"
    add("--contestants", nargs="+", default=DEFAULT, help=known)
    ours = "add qlora with these recipe keys (repeatable)"
    add("--ours", action="append", default=[], metavar="'NAME KEY=VALUE ...'", help=ours)
    add("--heats", nargs="+", default=TUNED_TRL, help="settings to choose trl-best from")
    add("--heat-steps", type=int, default=2, help="steps of a heat")
    add("--heat-limit", type=float, default=240.0, help="seconds after which a heat is stopped")
    add("--threads", type=int, nargs="+", default=[2], help="a race for each number")
    add("--steps", type=int, default=5, help="optimizer steps of a run")
    add("--warmup", type=int, default=1, help="first steps that do not count")
    add("--repetitions", type=int, default=2, help="runs of each contestant")
    add("--rows-per-step", type=int, default=16, help="a multiple of --micro-batch")
    add("--micro-batch", type=int, default=4, help="rows per forward")
    add("--rank", type=int, default=16, help="of the adapter; alpha is twice as much")
    add("--limit", type=float, default=900.0, help="seconds after which a run is stopped")


def _add_growth(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--growth", action="store_true", help="run the sweeps in place of the race")
    add("--growth-contestants", nargs="+", default=["ours", "trl"], help="and those of --ours")
    add("--lengths", type=int, nargs="*", default=[256, 512, 1024, 2048, 4096], help="of rows")
    add("--tokens-per-step", type=int, default=4096, help="in the sweep of lengths")
    add("--micro-batches", type=int, nargs="*", default=[1, 2, 4, 8, 16], help="rows a forward")
    add("--ranks", type=int, nargs="*", default=[8, 16, 64, 256], help="of the adapter")


def told(words: Sequence[str]) -> str:
    """Return the given options, without those in `PLACES`."""
    left = iter(words)
    kept = []
    for word in left:
        if word.partition("=")[0] not in PLACES:
            kept.append(f"'{word}'" if " " in word else word)
        elif "=" not in word:
            next(left)
    return " ".join(kept)


def interpreters(options: argparse.Namespace) -> dict[Kind, str]:
    """Return the Python of each kind of contestant; ours unless another was made.

    Raises:
        SystemExit: a contestant has no environment.
    """
    pythons: dict[Kind, str] = dict.fromkeys(("ours", "plain", "trl"), sys.executable)
    for kind in ("trl", "llamafactory"):
        made = options.environments and options.environments.resolve() / kind / "bin" / "python"
        if made and made.exists():
            pythons[kind] = str(made)
    asked = [*options.contestants, *(options.growth_contestants if options.growth else [])]
    wanted = {CONTESTANTS[name].kind for name in asked if name in CONTESTANTS}
    if missing := wanted - set(pythons):
        sys.exit(
            f"no environment for {', '.join(sorted(missing))}: make it with "
            "benchmarks/race/environments.sh FOLDER, and give --environments FOLDER"
        )
    return pythons
