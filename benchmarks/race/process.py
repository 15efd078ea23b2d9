"""Run a contestant, and measure it from outside in the same way as all others.

A contestant logs its steps to a file. Within `_PAUSE` seconds of each line, the time, CPU
time and memory of the process are read.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.race.contestants import Contestant
from benchmarks.race.machine import Busy, share_before

_PAUSE = 0.02


@dataclass(frozen=True)
class Mark:
    """Measurements at one moment. Seconds count from the start of the process."""

    at: float
    cpu_seconds: float
    """CPU time of the process and all of its children."""
    machine: Busy
    resident_mb: float
    peak_mb: float
    """Since the start, or since the model was loaded."""


@dataclass
class Observed:
    """Measurements of one run."""

    start: Mark
    loaded: Mark | None = None
    steps: list[tuple[Mark, dict[str, float]]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    """Facts that a peer reported when the model was loaded."""
    load_average: float = 0.0
    others_before: float = 0.0
    failure: str = ""
    """The end of its log if it failed."""


class Tail:
    """Read the complete lines that are appended to a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._at = 0

    def read(self) -> list[str]:
        try:
            with self._path.open("rb") as file:
                file.seek(self._at)
                text = file.read()
        except FileNotFoundError:
            return []
        whole, newline, _ = text.rpartition(b"\n")
        self._at += len(whole) + len(newline)
        return whole.decode("utf-8", "replace").splitlines() if newline else []


def environment(threads: int, *, project: Path | None) -> dict[str, str]:
    """Return the environment of a contestant: equal threads, offline, our sources only for us."""
    variables = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    variables |= {
        name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS")
    }
    variables |= {
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    if project is not None:
        variables["PYTHONPATH"] = str(project)
    return variables


def watch(
    one: Contestant, command: list[str], folder: Path, variables: dict[str, str], *, limit: float
) -> Observed:
    """Run a command to its end, or for `limit` seconds.

    Args:
        folder: for the files and the log of the contestant.
    """
    others, load = share_before(), os.getloadavg()[0]
    log = folder / "log.txt"
    with log.open("wb") as file:
        started = time.perf_counter()
        process = subprocess.Popen(
            command, stdout=file, stderr=file, env=variables, cwd=folder, start_new_session=True
        )
        watched = psutil.Process(process.pid)
        seen = Observed(read(watched, started), load_average=load, others_before=others)
        tails = Tail(one.lines(folder)), Tail(log)
        try:
            while process.poll() is None:
                time.sleep(_PAUSE)
                look(one, watched, started, tails, seen)
                if time.perf_counter() - started > limit:
                    seen.failure = f"stopped after {limit:.0f} s"
                    break
        finally:
            if process.poll() is None:
                # It has its own process group, so its children end too.
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if process.returncode and not seen.failure:
        seen.failure = "\n".join(log.read_text(errors="replace").splitlines()[-12:])
    return seen


def look(
    one: Contestant,
    watched: psutil.Process,
    started: float,
    tails: tuple[Tail, Tail],
    seen: Observed,
) -> None:
    """Record the steps in new lines."""
    lines, log = (tail.read() for tail in tails)
    if not lines and not log:
        return
    # The process may end while it is read.
    with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError, FileNotFoundError):
        mark = read(watched, started)
        told = one.loaded(lines, log)
        if told is not None and seen.loaded is None:
            seen.loaded, seen.facts = mark, told
            reset_peak(watched.pid)
        for line in lines:
            if step := one.step(line):
                seen.steps.append((mark, step))


def read(process: psutil.Process, started: float) -> Mark:
    """Measure time, CPU time and memory now."""
    status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
    kib = {
        name: int(value.split()[0])
        for name, _, value in (line.partition(":") for line in status.splitlines())
        if name in ("VmHWM", "VmRSS")
    }  # neither is there once the process has ended
    cpu = sum(_cpu_seconds(one) for one in [process, *process.children(recursive=True)])
    ended = process.cpu_times()
    return Mark(
        at=time.perf_counter() - started,
        cpu_seconds=cpu + ended.children_user + ended.children_system,
        machine=Busy.now(),
        resident_mb=kib.get("VmRSS", 0) / 1024,
        peak_mb=kib.get("VmHWM", 0) / 1024,
    )


def _cpu_seconds(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return float(times.user + times.system)


def reset_peak(pid: int) -> None:
    """Reset the kernel's peak (man 5 proc, clear_refs), to exclude loading."""
    Path(f"/proc/{pid}/clear_refs").write_text("5", encoding="utf-8")


def interpreter_mb(python: str, imports: str, variables: dict[str, str]) -> float:
    """Measure the resident memory of an interpreter with a contestant's imports."""
    script = f"{imports}\nprint(open('/proc/self/status').read())"
    done = subprocess.run(
        [python, "-c", script], capture_output=True, text=True, env=variables, check=True
    )
    found = next(line for line in done.stdout.splitlines() if line.startswith("VmRSS"))
    return int(found.split()[1]) / 1024
