"""Kill a run at random moments, over and over: does it come to what nobody killed comes to?

    python -m benchmarks.random_kills tiny
    python -m benchmarks.random_kills gsm8k --data FOLDER_WITH_GSM8K

`qlora train` is started as a user starts it and gets SIGKILL at a seeded random moment; then it is
started again with `--resume auto`, or anew where nothing was saved yet, and so on. A quarter of the
kills fall between the start of the process and its first step (half of these have to prepare the
data, and to unpack the model, again), a tenth after the last step, the others anywhere in between,
at moments that let the run advance. Where one fell is read off what the process had said and what
lies in its folders.

After each kill every checkpoint must be whole, and that of the undisturbed run; at the end so must
be the weights, the metrics, the record and the names of all files, and nothing may be left over.

`tiny` is a random model of two layers; `gsm8k` the demo model in NF4 (`--model` names another), on
short rows of train.jsonl and test.jsonl of GSM8K. The latter also measures what a save costs.
Writes its part of random_kills.json, and random_kills.md, beside this script.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from qlora_cli.durable import describe_file

HERE = Path(__file__).resolve().parent
MODEL = HERE.parent / "models/smollm2-135m-instruct/SmolLM2-135M-Instruct.Q4_1.gguf"
CLOCKS = ("tokens_per_second", "peak_memory_bytes")
RESULTS = ("status", "steps", "tokens", "untrained", "best", "fingerprint", "base", "tasks")
"""What the record says of the run itself, and not of the clock or of how it was resumed."""
KEEP = 2
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
    """When to kill: so much of a stretch of the run after its beginning.

    The stretch is from the start of the process to the first step (`step` is None), from a step to
    the next, or from the last step to the end.
    """

    step: int | None
    share: float
    is_cold: bool = False
    """Data have to be prepared, and the model unpacked."""


@dataclass(frozen=True)
class Attempt:
    """A process that ended, or was killed."""

    lines: list[tuple[float, str]]
    """What it said, with the seconds since its start."""
    seconds: float
    exit_code: int
    """-9 if it was killed."""
    began: float
    """In seconds since 1970."""

    @property
    def step(self) -> int | None:
        """The last step that it told of; None before the first."""
        steps = [step for _, line in self.lines if (step := step_of(line)) is not None]
        return steps[-1] if steps else None


def step_of(line: str) -> int | None:
    """The step that a line of the console is about."""
    found = STEP.search(line)
    return int(found[1]) if found else None


def draw_aims(kills: int, max_steps: int, seed: int) -> list[Aim]:
    """Moments in an order that lets the run advance."""
    draw = random.Random(seed)
    num_starts, num_ends = round(kills / 4), max(1, round(kills / 10))
    steps = sorted(draw.sample(range(max_steps), kills - num_starts - num_ends))
    aims = [Aim(step, draw.random()) for step in steps]
    for number in range(num_starts):
        place = draw.randrange(len(aims) + 1)
        aims.insert(place, Aim(None, draw.random(), is_cold=number % 2 == 0))
    return aims + [Aim(max_steps, draw.random()) for _ in range(num_ends)]


class Clock:
    """How long the stretches of the undisturbed run took."""

    def __init__(self, attempt: Attempt, max_steps: int) -> None:
        self._told: dict[int, float] = {}
        for moment, line in attempt.lines:
            step = step_of(line)
            if step is not None:
                self._told.setdefault(step, moment)
        self._told[max_steps + 1] = attempt.seconds

    def seconds(self, aim: Aim) -> float:
        if aim.step is None:
            return aim.share * self._told[0]
        return aim.share * self.turn(aim.step)

    def turn(self, step: int) -> float:
        """From the end of a step to that of the next; from the last one, to that of the process."""
        return self._told[step + 1] - self._told[step]


class Experiment:
    """One form, in a folder of its own."""

    def __init__(self, form: Form, folder: Path) -> None:
        self.form = form
        self.cache = folder / "cache"
        self.whole = folder / "undisturbed"
        self.run = folder / "run"
        self.manifests: dict[int, bytes] = {}

    def undisturbed(self) -> Attempt:
        """The run to compare with; it keeps all of its checkpoints."""
        done = self.start(self.whole, keep=10**6)
        if done.exit_code:
            sys.exit("the undisturbed run failed:\n" + "\n".join(line for _, line in done.lines))
        self.manifests = whole_checkpoints(self.whole)
        return done

    def start(
        self,
        run: Path,
        *words: str,
        keep: int = KEEP,
        step: int | None = None,
        seconds: float | None = None,
    ) -> Attempt:
        """Train until the end, or until so many seconds after the start, or after a step."""
        command = [sys.executable, "-m", "qlora_cli", "train", str(self.form.recipe), *words]
        command += ["--set", f"output.dir={run}", "--set", f"output.keep_checkpoints={keep}"]
        environment = os.environ | {"QLORA_CACHE": str(self.cache), "HF_HUB_OFFLINE": "1"}
        began, started = time.time(), time.monotonic()
        lines: list[tuple[float, str]] = []
        with subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env=environment,
        ) as process:
            assert process.stderr is not None
            if seconds is not None:
                for line in process.stderr if step is not None else ():
                    lines.append((time.monotonic() - started, line.rstrip()))
                    if (step_of(line) or 0) >= (step or 0) and step_of(line) is not None:
                        break
                try:
                    process.wait(seconds)
                except subprocess.TimeoutExpired:
                    process.kill()
            for line in process.stderr:
                lines.append((time.monotonic() - started, line.rstrip()))
        return Attempt(lines, time.monotonic() - started, process.returncode, began)

    def how_to_go_on(self) -> list[str]:
        """As the hints of the errors say: from what was saved, or else anew."""
        if whole_checkpoints(self.run):
            return ["--resume", "auto"]
        if (self.run / "run.json").exists():
            shutil.rmtree(self.run)
        return []

    def forget_prepared(self) -> None:
        """What preparation finished; what a kill left behind stays, for the next one to clear."""
        for path in self.cache.glob("*/[!.]*"):
            if path.is_dir():
                shutil.rmtree(path)

    def where(self, attempt: Attempt) -> str:
        """Where a kill fell."""
        marks = [
            (self.run / "checkpoints", ".step-*.unfinished", "save: writing"),
            (self.run / "checkpoints", ".step-*.removed", "save: removing an older one"),
            (self.run, ".best.*", "writing the best weights"),
            (self.run, ".last.*", "writing the last weights"),
            (self.run, "last", "record, page and model cards"),
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
            if last.startswith("a pass over"):
                return "loading the model"
            return "first evaluation" if is_built else "data: reading, auditing, sums"
        if "finished after" in last or last.startswith(("best ", "next:")):
            return "after its end"
        is_measured = "  eval_" in last
        if "  loss " in last and (step % form.save_every == 0 or step == form.max_steps):
            path = self.run / "checkpoints" / f"step-{step:08d}"
            if not path.exists():
                return "save: before its first file"
        if not is_measured and (step % form.eval_every == 0 or step in (0, form.max_steps)):
            return "save: reading back; evaluation"
        return "writing the last weights" if step == form.max_steps else "step"

    def kill(self, aim: Aim, clock: Clock) -> dict[str, Any] | None:
        """One kill, and what it left; None if the process had ended before."""
        if aim.is_cold:
            self.forget_prepared()
        words = self.how_to_go_on()
        before = max(whole_checkpoints(self.run), default=None) if words else None
        attempt = self.start(self.run, *words, step=aim.step, seconds=clock.seconds(aim))
        if attempt.exit_code == 0:
            return None
        told = "\n".join(line for _, line in attempt.lines)
        if attempt.exit_code != -9:
            sys.exit(f"qlora train {' '.join(words)} failed ({attempt.exit_code}):\n{told}")
        whole = whole_checkpoints(self.run)
        saved, done = max(whole, default=0), attempt.step or 0
        return {
            "went_on_from": before,
            "where": self.where(attempt),
            "seconds": round(attempt.seconds, 2),
            "step": done,
            "saved": saved,
            "lost": max(0, done - saved),
            "damaged": len(list((self.run / "checkpoints").glob("step-*"))) - len(whole),
            "different": sorted(s for s, text in whole.items() if self.manifests.get(s) != text),
        }

    def kill_all(self, aims: list[Aim], clock: Clock) -> list[dict[str, Any]]:
        """All of them; where one came too late, another at half of the time."""
        kills: list[dict[str, Any]] = []
        for aim in aims:
            while (found := self.kill(aim, clock)) is None:
                aim = Aim(aim.step, aim.share / 2, aim.is_cold)
            kills.append({"number": len(kills) + 1, **found})
            print(", ".join(f"{name} {value}" for name, value in kills[-1].items()), flush=True)
        return kills

    def compare(self) -> dict[str, Any]:
        """What is not as in the undisturbed run: for each kind of thing, the names."""
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
                # The model card tells the time.
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
    """What was logged, but for the clock."""
    rows = map(json.loads, (run / "metrics.jsonl").read_text("utf-8").splitlines())
    return [{name: v for name, v in row.items() if name not in CLOCKS} for row in rows]


def whole_checkpoints(run: Path) -> dict[int, bytes]:
    """The manifests of the checkpoints whose files are what these say, by their step."""
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


def tiny_form(folder: Path, kills: int, max_steps: int) -> Form:
    """A random model of two layers in NF4, on rows enough for their preparation to be hit."""
    from tests.conftest import save_tiny_model

    save_tiny_model(folder / "model")
    rows = [
        {"prompt": f"say {word} {count}", "completion": " ".join([word] * count)}
        for word in ("ab", "cd", "ef", "gh")
        for count in (1, 2, 3, 5)
    ]
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows * 200), encoding="utf-8")
    kind = {"type": "prompt_completion"}
    document = {
        "model": {"path": str(folder / "model")},
        "quantization": {"type": "nf4"},
        "adapter": {"type": "lora", "r": 4, "alpha": 8, "dropout": 0.1},
        "data": {
            "train": {"path": str(data), "format": kind},
            "evaluation": {"path": str(data), "format": kind, "limit": 6},
            "max_length": 96,
        },
        "training": {"batch_size": 4, "micro_batch_size": 2, "gradient_checkpointing": False},
        "optimizer": {"type": "adamw", "learning_rate": 1e-2},
    }
    return as_form("a random model of two layers", document, folder, kills, max_steps, 3)


def gsm8k_form(folder: Path, kills: int, max_steps: int, data: Path, model: Path) -> Form:
    """The recipe of the benchmarks on GSM8K, on the short rows of both splits."""
    document = yaml.safe_load((HERE / "gsm8k.yaml").read_text(encoding="utf-8"))
    for split, name, number in (("train", "train", 400), ("evaluation", "test", 8)):
        lines = (data / f"{name}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        short = [line for line in lines if len(line) < 400][:number]
        (folder / f"{name}.jsonl").write_text("".join(short), encoding="utf-8")
        document["data"][split] |= {"path": str(folder / f"{name}.jsonl"), "limit": None}
    document["model"]["path"] = str(model)
    document["adapter"]["dropout"] = 0.1
    document["training"] |= {"epochs": None, "batch_size": 4, "micro_batch_size": 2}
    return as_form(
        f"{model.stem} in NF4 on short rows of GSM8K", document, folder, kills, max_steps, 5
    )


def as_form(
    title: str, document: dict[str, Any], folder: Path, kills: int, max_steps: int, eval_every: int
) -> Form:
    """With the recipe written down; a checkpoint each second step, a line for each."""
    save_every = 2
    document["training"] |= {
        "max_steps": max_steps,
        "save_every": save_every,
        "eval_every": eval_every,
        "log_every": 1,
    }
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(document), encoding="utf-8")
    return Form(title, recipe, kills, max_steps, save_every, eval_every)


def measure_saves(experiment: Experiment, clock: Clock, repeats: int = 10) -> dict[str, Any]:
    """What a checkpoint of the undisturbed run takes: by itself, and within the run."""
    import torch

    from qlora_cli.build import load_base
    from qlora_cli.checkpoint import load_checkpoint, random_states, save_checkpoint
    from qlora_cli.recipe_file import load_recipe
    from qlora_cli.world import World

    os.environ["QLORA_CACHE"] = str(experiment.cache)
    recipe, world = load_recipe(experiment.whole / "recipe.yaml", []).recipe, World()
    model = recipe.adapter.attach(
        load_base(recipe, world.compute_dtype(recipe.training.precision), world.device)
    )
    parts: dict[str, Any] = {
        "model": model,
        "optimizer": recipe.optimizer.build(model.parameters(), world.device),
        "scaler": torch.amp.GradScaler(world.device.type, enabled=False),
    }
    newest = experiment.whole / "checkpoints" / f"step-{max(experiment.manifests):08d}"
    state, _ = load_checkpoint(newest, **parts)
    seconds, cpu_seconds = [], []
    for _ in range(repeats):
        state.step += 1
        started, used = time.perf_counter(), time.process_time()
        place = experiment.cache.parent / "saves"
        save_checkpoint(place, state=state, random_states=[random_states()], keep=KEEP, **parts)
        seconds.append(time.perf_counter() - started)
        cpu_seconds.append(time.process_time() - used)
    form = experiment.form
    plain = [s for s in range(1, form.max_steps) if s % form.save_every and s % form.eval_every]
    saved = [s for s in range(1, form.max_steps) if not s % form.save_every and s % form.eval_every]
    return {
        "bytes": sum(file.stat().st_size for file in newest.iterdir()),
        "seconds": [round(pick(seconds), 3) for pick in (min, statistics.median, max)],
        "cpu_seconds": round(statistics.median(cpu_seconds), 3),
        "share_at_one_a_minute": round(statistics.median(seconds) / 60, 5),
        "step_seconds": round(statistics.median(map(clock.turn, plain)), 3),
        "step_and_save_seconds": round(statistics.median(map(clock.turn, saved)), 3),
    }


def processor() -> str:
    """The name of the processor, as Linux tells it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def examine(form: Form, folder: Path, seed: int, *, with_saves: bool = False) -> dict[str, Any]:
    """The run undisturbed, killed until no kill is left, and finished; what is different."""
    experiment = Experiment(form, folder)
    clock = Clock(experiment.undisturbed(), form.max_steps)
    kills = experiment.kill_all(draw_aims(form.kills, form.max_steps, seed), clock)
    last = experiment.start(experiment.run, *experiment.how_to_go_on())
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
        "machine": f"{processor()}, {os.environ.get('OMP_NUM_THREADS', os.cpu_count())} threads",
        "packages": {n: importlib.metadata.version(n) for n in ("torch", "transformers", "peft")},
        "kills": kills,
        "different": experiment.compare(),
        "save": measure_saves(experiment, clock) if with_saves else None,
    }


def is_same(report: dict[str, Any]) -> bool:
    """Whether nothing was lost but steps that no checkpoint had yet."""
    kills = report["kills"]
    return not any(report["different"].values()) and not any(
        kill["damaged"] or kill["different"] for kill in kills
    )


def as_markdown(reports: dict[str, dict[str, Any]]) -> str:
    """The page: for each form what came of it, where kills fell, and each of them."""
    lines = [
        "<!-- Written by benchmarks/random_kills.py; run that instead of editing. -->",
        "# Runs that are killed at random moments",
        "",
        "SIGKILL at seeded moments, each followed by `--resume auto`, or by a new start where no "
        "checkpoint was there yet; `benchmarks/random_kills.py` says how moments are drawn.",
    ]
    for name, report in reports.items():
        lines += ["", *_form_lines(name, report)]
    return "\n".join(lines) + "\n"


def _form_lines(name: str, report: dict[str, Any]) -> list[str]:
    kills = report["kills"]
    command = f"python -m benchmarks.random_kills {name} --seed {report['seed']}"
    command += " --data FOLDER_WITH_GSM8K" if name == "gsm8k" else ""
    compared = ", ".join(
        f"{what}: {found or 'the same'}"
        for what, found in report["different"].items()
        if what != "cache"
    )
    checked = sum(kill["saved"] > 0 for kill in kills)
    places: dict[str, list[int]] = {}
    for kill in kills:
        places.setdefault(kill["where"], []).append(kill["lost"])
    return [
        f"## {report['title'][0].upper()}{report['title'][1:]}",
        "",
        f"`{command}`: {len(kills)} kills of a run of {report['max_steps']} steps, saved after "
        f"every {report['save_every']} and evaluated after every {report['eval_every']}. "
        f"{report['machine']}; commit {report['commit']}.",
        "",
        f"Compared with the undisturbed run, bit for bit: {compared}. After the kills "
        f"{sum(kill['damaged'] for kill in kills)} checkpoints were damaged; those of "
        f"{checked} kills were compared with the undisturbed run's of the same step, and "
        f"{sum(bool(kill['different']) for kill in kills)} differed. Left in the cache: "
        f"{', '.join(report['different']['cache']) or 'nothing'}.",
        "",
        *_save_lines(report["save"]),
        "| where | kills | steps to do again |",
        "|---|---|---|",
        *(
            f"| {where} | {len(lost)} | {sum(lost)} |"
            for where, lost in sorted(places.items(), key=lambda item: -len(item[1]))
        ),
        f"| in all | {len(kills)} | {sum(kill['lost'] for kill in kills)} |",
        "",
        "| kill | started from | after | where | done | saved | steps to do again |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {kill['number']} | {_started(kill)} | {kill['seconds']:.1f} s | {kill['where']} | "
            f"{kill['step']} | {kill['saved']} | {kill['lost']} |"
            for kill in kills
        ),
    ]


def _started(kill: dict[str, Any]) -> str:
    from_step = kill["went_on_from"]
    return "the start" if from_step is None else f"step {from_step}"


def _save_lines(save: dict[str, Any] | None) -> list[str]:
    if save is None:
        return []
    low, median, high = save["seconds"]
    return [
        f"A checkpoint is {save['bytes'] / 1e6:.1f} MB. A save (written, flushed, read back, an "
        f"older one removed) takes {median:.2f} s ({low:.2f} to {high:.2f}), "
        f"{save['cpu_seconds']:.2f} s of the processor: {save['share_at_one_a_minute']:.1%} of a "
        f"run that saves once a minute. Within the run a step takes {save['step_seconds']:.2f} s, "
        f"and one that is saved {save['step_and_save_seconds']:.2f} s (medians).",
        "",
    ]


def main() -> int:
    """Run a form and write what came of it: 0 if it came to the same."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("form", choices=["tiny", "gsm8k"])
    parser.add_argument("--data", type=Path, help="folder with train.jsonl and test.jsonl of GSM8K")
    parser.add_argument("--model", type=Path, default=MODEL, help="another model than the demo's")
    parser.add_argument("--kills", type=int, help="50 for tiny, 20 for gsm8k")
    parser.add_argument("--steps", type=int, help="60 for tiny, 30 for gsm8k; not below the kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where to work, and leave what was made")
    options = parser.parse_args()
    if (options.form == "gsm8k") != (options.data is not None):
        parser.error("gsm8k needs --data, and tiny takes none")
    kills, steps = {"tiny": (50, 60), "gsm8k": (20, 30)}[options.form]
    kills, steps = options.kills or kills, options.steps or steps
    if steps < kills:
        parser.error(f"--steps {steps} are too few for {kills} kills")
    with tempfile.TemporaryDirectory() as made:
        folder = options.folder or Path(made)
        folder.mkdir(parents=True, exist_ok=True)
        if options.form == "tiny":
            form = tiny_form(folder, kills, steps)
        else:
            form = gsm8k_form(folder, kills, steps, options.data, options.model)
        report = examine(form, folder, options.seed, with_saves=options.form == "gsm8k")
    target = HERE / "random_kills.json"
    reports = json.loads(target.read_text("utf-8")) if target.exists() else {}
    reports = dict(sorted({**reports, options.form: report}.items(), reverse=True))
    target.write_text(json.dumps(reports, indent=1) + "\n", encoding="utf-8")
    target.with_suffix(".md").write_text(as_markdown(reports), encoding="utf-8")
    print("the same" if is_same(report) else f"NOT THE SAME: {report['different']}")
    return 0 if is_same(report) else 1


if __name__ == "__main__":
    sys.exit(main())
