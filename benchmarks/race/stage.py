"""Run the contestants of a race one after the other, each in its own process."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.race.contestants import CONTESTANTS, IMPORTS, Contestant, Kind, Sizes
from benchmarks.race.figures import Figures, has_rows, of_run, together
from benchmarks.race.floor import Geometry, best_of, operations, seconds_of_step
from benchmarks.race.options import ROOT
from benchmarks.race.process import environment, interpreter_mb, watch
from benchmarks.race.rows import Rows


@dataclass
class Stage:
    """Model, folders and settings shared by all runs of a race."""

    work: Path
    """Folder for the runs' files. Each run is removed when it ends."""
    kept: Path
    """Folder for the reference losses, which are computed once."""
    model: Path
    pythons: Mapping[Kind, str]
    threads: int
    warmup: int
    limit: float
    """Seconds after which a run is stopped."""
    _interpreters: dict[str, float] = field(default_factory=dict)
    _number: int = 0

    def run(self, one: Contestant, rows: Rows, sizes: Sizes) -> Figures:
        """Run one contestant once."""
        self._number += 1
        folder = self.work / f"{self._number:03d}-{one.name}"
        folder.mkdir(parents=True)
        python = self.pythons[one.kind]
        variables = environment(self.threads, project=ROOT if one.kind == "ours" else None)
        seen = watch(
            one,
            one.command(python, self.model, rows, sizes, folder),
            folder,
            variables,
            limit=self.limit,
        )
        figures = of_run(
            seen,
            warmup=self.warmup,
            threads=self.threads,
            num_processors=os.cpu_count() or 1,
            interpreter_mb=self._interpreter_mb(one.kind, variables),
        )
        if "failed" not in figures:
            figures["has_same_rows"] = has_rows(figures, rows)
        say(f"{one.name:<20} {summary(figures)}")
        shutil.rmtree(folder)
        return figures

    def in_turn(
        self, several: Sequence[Contestant], rows: Rows, sizes: Sizes, *, repetitions: int
    ) -> dict[str, Figures]:
        """Run all contestants in turn, and repeat: A B A B."""
        runs: dict[str, list[Figures]] = {one.name: [] for one in several}
        for _ in range(repetitions):
            for one in several:
                runs[one.name].append(self.run(one, rows, sizes))
        return {name: together(each) for name, each in runs.items()}

    def reference(self, rows: Rows, sizes: Sizes) -> Figures:
        """Return the float32 losses of the same work, cached by rows and versions."""
        facts = [vars(sizes), versions(self.pythons["plain"]), rows.by_length.read_text()]
        peer = Path(__file__).parent / "peers" / "with_transformers.py"
        facts += [peer.read_text(), (self.model / "config.json").read_text(), str(self.model)]
        digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
        path = self.kept / f"reference-{digest[:24]}.json"
        if path.is_file():
            say(f"{'reference':<20} as computed before")
            figures: Figures = json.loads(path.read_text(encoding="utf-8"))
            return figures
        figures = self.run(CONTESTANTS["reference"], rows, sizes)
        if "failed" in figures:
            sys.exit(f"the reference failed:\n{figures['failed']}")
        self.kept.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(figures) + "\n", encoding="utf-8")
        return figures

    def rates(self, rows: Rows, sizes: Sizes) -> dict[str, Any]:
        """Measure the rates of the products of one micro-step."""
        steps = len(rows.lengths)
        micro_steps = sizes.rows_per_step / sizes.micro_batch
        job = self.work / "floor.json"
        supervised = sum(map(sum, rows.supervised))
        facts = {
            "config": str(self.model / "config.json"),
            "tokens": round(rows.num_tokens / steps / micro_steps),
            "supervised": round(supervised / steps / micro_steps),
            "threads": self.threads,
        }
        job.write_text(json.dumps(facts), encoding="utf-8")
        command = [self.pythons["ours"], "-m", "benchmarks.race.floor", str(job)]
        variables = environment(self.threads, project=ROOT)
        done = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
        measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        say(f"{'floor':<20} {measured['linears_per_second'] / 1e9:,.0f} GFLOP/s in the linears")
        return measured

    def floor(
        self, measured: Sequence[Mapping[str, Any]], rows: Rows, sizes: Sizes
    ) -> dict[str, Any]:
        """Compute the floor of a mean step, and its tokens per second."""
        steps = len(rows.lengths)
        config = json.loads((self.model / "config.json").read_text(encoding="utf-8"))
        geometry, rates = Geometry.of(config), best_of(measured)
        counted = operations(
            geometry,
            lengths=[length for step in rows.lengths for length in step],
            supervised=sum(map(sum, rows.supervised)),
            r=sizes.r,
        )
        counted = {name: number / steps for name, number in counted.items()}
        seconds = seconds_of_step(
            geometry, counted, rates, micro_steps=sizes.rows_per_step / sizes.micro_batch
        )
        return {
            "operations_per_step": counted,
            "seconds_per_step": seconds,
            "tokens_per_second": rows.num_tokens / steps / seconds["all"],
            "rates": rates,
        }

    def with_threads(self, threads: int) -> Stage:
        return replace(self, threads=threads, work=self.work / f"threads-{threads}")

    def _interpreter_mb(self, kind: Kind, variables: dict[str, str]) -> float:
        if kind not in self._interpreters:
            self._interpreters[kind] = interpreter_mb(self.pythons[kind], IMPORTS[kind], variables)
        return self._interpreters[kind]


def versions(python: str) -> dict[str, str]:
    """Return the versions of the relevant packages in an environment."""
    names = ["torch", "transformers", "peft", "bitsandbytes", "accelerate", "trl", "llamafactory"]
    script = (
        "import importlib.metadata as m, json, sys\n"
        f"have = {{d.name.lower() for d in m.distributions()}} & set({names!r})\n"
        "print(json.dumps({'python': sys.version.split()[0]} | "
        "{name: m.version(name) for name in sorted(have)}))"
    )
    found: dict[str, str] = json.loads(
        subprocess.check_output([python, "-c", script], text=True, cwd="/")
    )
    return found


def summary(figures: Figures) -> str:
    """Format the figures of a run as one line of progress."""
    if "failed" in figures:
        return f"failed: {figures['failed'].splitlines()[-1]}"
    busy = ", the machine was busy" if figures["is_busy"] else ""
    rows = "" if figures["has_same_rows"] else ", other rows"
    return (
        f"{figures['tokens_per_second']:7.0f} tokens/s, "
        f"{figures['cpu_seconds_per_1000_tokens']:.2f} processor s for 1,000, "
        f"{figures['peak_mb']:,.0f} MiB, first step after {figures['seconds_to_first_step']:.0f} s"
        f"{rows}{busy}"
    )


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
