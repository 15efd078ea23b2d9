"""Kill a run, and compare it with an undisturbed one."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_cli.common.atomic_files import describe_file

CLOCKS = ("tokens_per_second", "peak_memory_bytes")
RESULTS = ("status", "steps", "tokens", "untrained", "best", "fingerprint", "base", "tasks")
"""Fields of the record that do not depend on the clock or on resuming."""
KEEP = 2
"""Checkpoints that the killed run keeps."""
STEP = re.compile(r"(?:^|: )step (\d+)(?:/\d+  loss|  eval_| of )")


@dataclass(frozen=True)
class Form:
    """A run to kill."""

    title: str
    recipe: Path
    kills: int
    max_steps: int
    save_every: int
    eval_every: int


@dataclass(frozen=True)
class Aim:
    """Moment to kill: a share of the duration of one stretch of the run.

    The stretch is from the start of the process to the first step, or to the end of preparation if
    that has to be done (`step` is None, `is_cold`); from a step to the next; or from the last step
    to the end.
    """

    step: int | None
    share: float
    is_cold: bool = False
    """Data must be prepared and the model unpacked first."""


@dataclass(frozen=True)
class Attempt:
    """A process that ended, or was killed."""

    lines: list[tuple[float, str]]
    """Console lines, with the seconds since the start of the process."""
    seconds: float
    exit_code: int
    """-9 if it was killed."""
    began: float
    """In seconds since 1970."""

    @property
    def step(self) -> int | None:
        """The last step that it logged; None before the first."""
        steps = [step for _, line in self.lines if (step := step_of(line)) is not None]
        return steps[-1] if steps else None


def step_of(line: str) -> int | None:
    """Return the step that a console line reports, or None."""
    found = STEP.search(line)
    return int(found[1]) if found else None


def draw_aims(kills: int, max_steps: int, seed: int) -> list[Aim]:
    """Draw moments, in an order that lets the run advance."""
    draw = random.Random(seed)
    num_starts, num_ends = round(kills / 4), max(1, round(kills / 10))
    later = draw.sample(range(1, max_steps), kills - num_starts - num_ends - 1)
    aims = [Aim(step, draw.random()) for step in (0, *sorted(later))]
    for number in range(num_starts):
        # The first start is among them.
        place = draw.randrange(len(aims) + 1) if number else 0
        aims.insert(place, Aim(None, draw.random(), is_cold=number % 2 == 0))
    return aims + [Aim(max_steps, draw.random()) for _ in range(num_ends)]


def until(heard: Iterator[tuple[float, str]], step: int) -> Iterator[tuple[float, str]]:
    """Yield lines until one reports the step, or a later one."""
    for moment, line in heard:
        yield moment, line
        found = step_of(line)
        if found is not None and found >= step:
            return


def kill_within(
    process: subprocess.Popen[str], heard: Iterator[tuple[float, str]], seconds: float, step: int
) -> Iterator[tuple[float, str]]:
    """Kill the process after `seconds`, or earlier when it logs `step`.

    It reaches the step earlier than planned on a machine that is less busy. Yields its lines.
    """
    timer = threading.Timer(seconds, process.kill)
    timer.start()
    for moment, line in heard:
        yield moment, line
        found = step_of(line)
        if found is not None and found >= step:
            process.kill()
            break
    timer.cancel()


class Clock:
    """Durations of the undisturbed run's stretches, and of a start with prepared data."""

    def __init__(self, attempt: Attempt, warm: Attempt, max_steps: int) -> None:
        self._warm = warm.seconds
        self._step_times: dict[int, float] = {}
        for moment, line in attempt.lines:
            step = step_of(line)
            if step is not None:
                self._step_times.setdefault(step, moment)
            elif line.startswith("one epoch: "):
                self._prepared = moment
            elif "finished after" in line:
                self._step_times[max_steps + 1] = moment

    def seconds(self, aim: Aim) -> float:
        if aim.step is None:
            return aim.share * (self._prepared if aim.is_cold else self._warm)
        return aim.share * self.turn(aim.step)

    def turn(self, step: int) -> float:
        """Return the seconds from a step to the next, or from the last step to the end."""
        return self._step_times[step + 1] - self._step_times[step]


class Experiment:
    """One form, in a folder of its own."""

    def __init__(self, form: Form, folder: Path) -> None:
        self.form = form
        self.cache = folder / "cache"
        self.whole = folder / "undisturbed"
        self.run = folder / "run"
        self.manifests: dict[int, bytes] = {}

    def undisturbed(self) -> Attempt:
        """Train the run to compare with. It keeps all of its checkpoints."""
        done = self.start(self.whole, keep=10**6)
        if done.exit_code:
            sys.exit("the undisturbed run failed:\n" + "\n".join(line for _, line in done.lines))
        self.manifests = whole_checkpoints(self.whole)
        return done

    def warm(self) -> Attempt:
        """Start with prepared data and model, and stop at the first logged step."""
        began = self.start(self.run, step=0, seconds=0)
        shutil.rmtree(self.run)
        return began

    def start(
        self,
        run: Path,
        *words: str,
        keep: int = KEEP,
        step: int | None = None,
        seconds: float | None = None,
    ) -> Attempt:
        """Train to the end, or kill `seconds` after the start or after `step`."""
        command = [sys.executable, "-m", "qlora_cli", "train", str(self.form.recipe), *words]
        command += ["--set", f"output.dir={run}", "--set", f"output.keep_checkpoints={keep}"]
        environment = os.environ | {"QLORA_CACHE": str(self.cache), "HF_HUB_OFFLINE": "1"}
        began, started = time.time(), time.monotonic()
        lines: list[tuple[float, str]] = []
        with subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            env=environment,
        ) as process:
            assert process.stdout is not None
            heard = ((time.monotonic() - started, line.rstrip()) for line in process.stdout)
            if step is not None:
                lines += until(heard, step)
            if seconds is not None:
                found = step_of(lines[-1][1]) if lines else None
                lines += kill_within(process, heard, seconds, 0 if found is None else found + 1)
            lines += heard
        return Attempt(lines, time.monotonic() - started, process.returncode, began)

    def resume_options(self) -> list[str]:
        """Return the options that resume the run. Without a checkpoint, remove it to start over."""
        if whole_checkpoints(self.run):
            return ["--resume", "auto"]
        if (self.run / "run.json").exists():
            shutil.rmtree(self.run)
        return []

    def forget_prepared(self) -> None:
        """Remove prepared data. Leftovers of a kill stay, for the next run to remove."""
        for path in self.cache.glob("*/[!.]*"):
            if path.is_dir():
                shutil.rmtree(path)

    def where(self, attempt: Attempt) -> str:
        """Return the stage that a kill interrupted."""
        marks = [
            (self.run / "checkpoints", ".step-*.unfinished", "save: writing"),
            (self.run / "checkpoints", ".step-*.removed", "save: removing an older one"),
            (self.run, ".best.*", "writing the best weights"),
            (self.run, ".last.*", "writing the last weights"),
            (self.run, "last", "record, model cards, end of the process"),
            (self.cache / "gguf", ".*", "unpacking the model"),
            (self.cache / "prepared", ".*", "preparing data"),
        ]
        for folder, pattern, words in marks:
            # Not what an earlier process left.
            if any(path.lstat().st_ctime >= attempt.began for path in folder.glob(pattern)):
                return words
        return self._where_in_the_run(attempt)

    def _where_in_the_run(self, attempt: Attempt) -> str:
        form, step = self.form, attempt.step
        last = attempt.lines[-1][1] if attempt.lines else ""
        if step is None:
            if not last:
                return "starting Python and libraries"
            is_built = last.startswith(("base model", "trained", "  "))
            if last.startswith("one epoch: "):
                return "loading the model"
            return "first evaluation" if is_built else "data: reading, auditing, sums"
        is_measured = "  eval_" in last
        if "  loss " in last and (step % form.save_every == 0 or step == form.max_steps):
            path = self.run / "checkpoints" / f"step-{step:08d}"
            if not path.exists():
                return "save: before its first file"
        if not is_measured and (step % form.eval_every == 0 or step in (0, form.max_steps)):
            return "save: reading back; evaluation"
        return "writing the last weights" if step == form.max_steps else "step"

    def kill(self, aim: Aim, clock: Clock) -> dict[str, Any] | None:
        """Kill one process and describe what it left; None if it had already ended."""
        if aim.is_cold:
            self.forget_prepared()
        words = self.resume_options()
        before = max(whole_checkpoints(self.run), default=None) if words else None
        attempt = self.start(self.run, *words, step=aim.step, seconds=clock.seconds(aim))
        if attempt.exit_code == 0:
            return None
        output = "\n".join(line for _, line in attempt.lines)
        if attempt.exit_code != -9:
            sys.exit(f"qlora train {' '.join(words)} failed ({attempt.exit_code}):\n{output}")
        whole = whole_checkpoints(self.run)
        saved, done = max(whole, default=0), attempt.step or 0
        return {
            "resumed_from_step": before,
            "where": self.where(attempt),
            "seconds": round(attempt.seconds, 2),
            "step": done,
            "saved": saved,
            "lost": max(0, done - saved),
            "damaged": len(list((self.run / "checkpoints").glob("step-*"))) - len(whole),
            "different": sorted(s for s, text in whole.items() if self.manifests.get(s) != text),
        }

    def kill_all(self, aims: list[Aim], clock: Clock) -> list[dict[str, Any]]:
        """Kill at all moments. If one comes too late, retry at half the time."""
        kills: list[dict[str, Any]] = []
        for aim in aims:
            while (found := self.kill(aim, clock)) is None:
                aim = Aim(aim.step, aim.share / 2, aim.is_cold)
            kills.append({"number": len(kills) + 1, **found})
            print(", ".join(f"{name} {value}" for name, value in kills[-1].items()), flush=True)
        return kills

    def compare(self) -> dict[str, Any]:
        """Return the names of all differences from the undisturbed run, by kind."""
        kept = sorted(self.manifests)[-KEEP:]
        mine, theirs = whole_checkpoints(self.run), {s: self.manifests[s] for s in kept}
        names = {name for name in files(self.whole) if not name.startswith("checkpoints/")}
        names |= {
            f"checkpoints/step-{s:08d}/{f}" for s in kept for f in json.loads(theirs[s])["files"]
        }
        names |= {f"checkpoints/step-{s:08d}/manifest.json" for s in kept}
        rows = [metrics(self.run), metrics(self.whole)]
        records = [json.loads((r / "run.json").read_text("utf-8")) for r in (self.run, self.whole)]
        weights = [n for n in sorted(names) if n.startswith(("last/", "best/"))]
        return {
            "weights": [
                name
                for name in weights
                # The model card contains the duration.
                if not name.endswith("README.md") and not self._is_same(name)
            ],
            "checkpoints": sorted(s for s in {*mine, *theirs} if mine.get(s) != theirs.get(s)),
            "metrics": [row.get("step") for row, other in zip(*rows, strict=False) if row != other]
            + ["number of rows"] * (len(rows[0]) != len(rows[1])),
            "record": [n for n in RESULTS if records[0].get(n) != records[1].get(n)],
            "files": sorted(names ^ files(self.run)),
            "cache": sorted(str(p.relative_to(self.cache)) for p in self.cache.glob("*/.*")),
        }

    def _is_same(self, name: str) -> bool:
        return (self.run / name).read_bytes() == (self.whole / name).read_bytes()


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def metrics(run: Path) -> list[dict[str, Any]]:
    """Read the logged metrics, without time and memory."""
    rows = map(json.loads, (run / "metrics.jsonl").read_text("utf-8").splitlines())
    return [{name: v for name, v in row.items() if name not in CLOCKS} for row in rows]


def whole_checkpoints(run: Path) -> dict[int, bytes]:
    """Return the manifests of complete checkpoints, by step."""
    found = {}
    for path in (run / "checkpoints").glob("step-*"):
        try:
            text = (path / "manifest.json").read_bytes()
            described = json.loads(text)["files"]
            is_whole = all(describe_file(path / name) == one for name, one in described.items())
        except (OSError, ValueError):
            continue
        if is_whole:
            found[int(path.name[5:])] = text
    return found
