"""Measure two runs at once on one CPU against one alone, with threads that spin or sleep.

    python -m benchmarks.shared_cpu [--steps 5] [--repetitions 2]

Writes `benchmarks/shared_cpu.md`. It needs the model and the data of `scripts/quickstart.sh`, and a
machine without other work. The settings are measured in turn.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from benchmarks.random_kills.examine import processor

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "configs/quickstart.yaml"
OUTPUT = Path(__file__).with_suffix(".md")
SETTINGS = {
    "as it is": {},
    "always spinning (libgomp's default)": {"GOMP_SPINCOUNT": "300000"},
    "never spinning": {"OMP_WAIT_POLICY": "passive"},
}


def start(environment: dict[str, str], steps: int) -> subprocess.Popen[str]:
    """Start a measurement of training in a process of its own."""
    command = [sys.executable, "-m", "qlora_cli", "bench", str(RECIPE), "--steps", str(steps)]
    for name in ("batch_size", "micro_batch_size"):
        command += ["--set", f"training.{name}=4"]
    return subprocess.Popen(
        [*command, "--json", "-q"],
        env={**os.environ, **environment},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )


def speed(process: subprocess.Popen[str]) -> float:
    """Wait for a measurement; return its median of tokens per second."""
    output, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"qlora bench ended with exit code {process.returncode}")
    return float(json.loads(output)["tokens_per_second"]["median"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--repetitions", type=int, default=2)
    options = parser.parse_args()
    alone: dict[str, list[float]] = {name: [] for name in SETTINGS}
    pairs: dict[str, list[float]] = {name: [] for name in SETTINGS}
    for _ in range(options.repetitions):
        for name, environment in SETTINGS.items():
            alone[name].append(speed(start(environment, options.steps)))
            both = [start(environment, options.steps) for _ in range(2)]
            pairs[name] += [speed(one) for one in both]
    _write(alone, pairs)


def _write(alone: dict[str, list[float]], pairs: dict[str, list[float]]) -> None:
    spinning = max(map(statistics.median, alone.values()))
    lines = [
        "# Two runs on one CPU",
        "",
        "`python -m benchmarks.shared_cpu` on this machine: " + processor() + ".",
        "SmolLM2-135M, NF4, four rows a step; tokens per second, medians with the range.",
        "The fair share is half of the fastest run alone.",
        "",
        "| waiting threads | one run alone | each of two at once | of the fair share |",
        "|---|---|---|---|",
    ]
    for name in SETTINGS:
        share = 2 * statistics.median(pairs[name]) / spinning
        lines.append(f"| {name} | {_range(alone[name])} | {_range(pairs[name])} | {share:.0%} |")
    OUTPUT.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(OUTPUT.read_text(encoding="utf-8"))


def _range(values: list[float]) -> str:
    return f"{statistics.median(values):.0f} ({min(values):.0f} to {max(values):.0f})"


if __name__ == "__main__":
    main()
