"""The experiment: an undisturbed run, a killed and resumed one, and their comparison."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.random_kills.experiment import Clock, Experiment, Form, draw_aims
from benchmarks.random_kills.saves import measure_saves

HERE = Path(__file__).resolve().parent


def examine(form: Form, folder: Path, seed: int, *, with_saves: bool = False) -> dict[str, Any]:
    """Train undisturbed, train with kills, and report the differences."""
    experiment = Experiment(form, folder)
    clock = Clock(experiment.undisturbed(), experiment.warm(), form.max_steps)
    kills = experiment.kill_all(draw_aims(form.kills, form.max_steps, seed), clock)
    last = experiment.start(experiment.run, *experiment.resume_options())
    if last.exit_code:
        sys.exit("the last start failed:\n" + "\n".join(line for _, line in last.lines))
    git = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "title": form.title,
        "seed": seed,
        "max_steps": form.max_steps,
        "save_every": form.save_every,
        "eval_every": form.eval_every,
        "commit": commit or None,
        "machine": f"{processor()}, threads: {os.environ.get('OMP_NUM_THREADS', os.cpu_count())}",
        "packages": {n: importlib.metadata.version(n) for n in ("torch", "transformers", "peft")},
        "kills": kills,
        "different": experiment.compare(),
        "save": measure_saves(experiment, clock) if with_saves else None,
    }


def is_same(report: dict[str, Any]) -> bool:
    """Return True if only steps since the last checkpoint were lost."""
    kills = report["kills"]
    return not any(report["different"].values()) and not any(
        kill["damaged"] or kill["different"] for kill in kills
    )


def processor() -> str:
    """Return the name of the processor."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
