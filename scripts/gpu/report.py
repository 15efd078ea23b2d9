"""Run checks in order, within a time, and report each at once: a table and a JSON file."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from qlora_cli.distributed.cuda import CudaState
from qlora_cli.distributed.world import is_out_of_memory
from scripts.gpu.bench import ROOT, Bench, NotHere, last_line

PACKAGES = ("torch", "triton", "transformers", "peft", "bitsandbytes", "accelerate", "datasets")
PASS, FAIL, NOT_HERE, SKIPPED = "pass", "FAIL", "not here", "skipped"


@dataclass(frozen=True)
class Check:
    """One check."""

    name: str
    seconds: float
    """Seconds that it takes on a large card, as estimated before one was at hand."""
    run: Callable[[Bench], str]
    """Returns the figures as text. It raises AssertionError if they are not as expected, and
    NotHere without a card."""


@dataclass
class Report:
    """Results so far. The file is written again after each check."""

    path: Path
    device: torch.device
    minutes: float | None
    started: float = field(default_factory=time.monotonic)
    results: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.machine = machine(self.device)

    def add(self, check: Check, result: str, text: str, seconds: float, figures: Any) -> None:
        """Print a result, and write all of them."""
        print(f"{check.name:<44}  {result:<8}  {seconds:6.1f} s  {text}", flush=True)
        self.results.append(
            {
                "name": check.name,
                "result": result,
                "text": text,
                "seconds": round(seconds, 2),
                "estimated_seconds": check.seconds,
                "figures": figures,
            }
        )
        self.write()

    def count(self, result: str) -> int:
        """Return how many checks have a result."""
        return sum(one["result"] == result for one in self.results)

    def write(self) -> None:
        """Write the report."""
        document = {
            "machine": self.machine,
            "minutes": self.minutes,
            "seconds": round(time.monotonic() - self.started, 1),
            "counts": {one: self.count(one) for one in (PASS, FAIL, NOT_HERE, SKIPPED)},
            "checks": self.results,
        }
        text = json.dumps(document, indent=1, default=str)
        self.path.write_text(text + "\n", encoding="utf-8")


def run_checks(bench: Bench, checks: Sequence[Check], report: Report) -> None:
    """Run checks in order. One that no longer fits the time is skipped; shorter ones still run."""
    for check in checks:
        remaining = bench.remaining()
        if remaining is not None and remaining < check.seconds:
            text = f"{remaining:.0f} s are left, and it takes about {check.seconds:.0f}"
            report.add(check, SKIPPED, text, 0.0, {})
            continue
        bench.figures, started = {}, time.monotonic()
        result, text = run_check(bench, check)
        report.add(check, result, text, time.monotonic() - started, bench.figures)


def run_check(bench: Bench, check: Check) -> tuple[str, str]:
    """Run a check; return its result and figures. An exception is a failed check."""
    try:
        return PASS, check.run(bench)
    except NotHere as error:
        return NOT_HERE, str(error) or "needs a card"
    except AssertionError as error:
        return FAIL, str(error) or "an assertion without a message"
    except subprocess.TimeoutExpired as error:
        return FAIL, f"stopped after {error.timeout:.0f} s, at the end of the time"
    # One failing check must not hide the results of the others.
    except Exception as error:
        name = "out of memory" if is_out_of_memory(error) else type(error).__name__
        return FAIL, f"{name}: {last_line(str(error))}"


def machine(device: torch.device) -> dict[str, Any]:
    """Describe the machine: card, driver, versions, and which of them differ from the pins."""
    found = versions()
    described: dict[str, Any] = {
        "device": "CPU",
        "python": platform.python_version(),
        "versions": found,
        "different_from_pins": differing(found, pins()),
        "cuda": torch.version.cuda,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
    }
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        described |= {
            "device": card.name,
            "capability": f"sm_{card.major}{card.minor}",
            "memory_bytes": card.total_memory,
            "driver": CudaState().driver,
            "architectures": torch.cuda.get_arch_list(),
            "cudnn": torch.backends.cudnn.version(),
        }
    return described


def versions() -> dict[str, str]:
    """Return the versions of the packages that matter here."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def pins() -> dict[str, str]:
    """Read the versions that the tests passed with."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==", 1) for line in lines if "==" in line and line[0] != "#")


def differing(found: dict[str, str], wanted: dict[str, str]) -> dict[str, str]:
    """Return the versions that differ from the pins, as text. Local parts (+cu130) do not count."""
    return {
        name: f"{version} (pinned: {wanted[name]})"
        for name, version in found.items()
        if name in wanted and version.partition("+")[0] != wanted[name].partition("+")[0]
    }


def commit() -> str | None:
    """Return the commit of the checkout; None where there is none."""
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:  # no git
        return None
    return done.stdout.strip() or None


def print_machine(device: torch.device) -> None:
    """Print the machine, and a line for each version that differs from the pins."""
    found = machine(device)
    if device.type == "cuda":
        print(
            f"{found['device']}, {found['capability']}, {found['memory_bytes'] / 2**30:.1f} GiB, "
            f"CUDA {found['cuda']}, cuDNN {found['cudnn']}, driver {found['driver']}; torch has "
            f"code for {', '.join(found['architectures'])}"
        )
    print(", ".join(f"{name} {version}" for name, version in found["versions"].items()))
    for name, text in found["different_from_pins"].items():
        print(f"not the pinned version: {name} {text}; the checks run all the same")
    if importlib.util.find_spec("flash_attn") is None:
        print("the package flash-attn is not installed, and not needed")
    print(flush=True)
