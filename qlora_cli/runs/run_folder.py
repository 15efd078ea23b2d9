"""The folder of a run: recipe, record, metrics, weights and checkpoints.

RUN/
├── README.md        a description of the run, and the next commands
├── recipe.yaml      the resolved recipe; `qlora train` on it repeats the run
├── run.json         versions, seeds, digests, counts, results
├── metrics.jsonl    one object per logged step
├── answers.jsonl    prompts and answers of `qlora eval`, one example per line
├── last/ best/      the trained adapter (PEFT's format) or model, with its tokenizer
└── checkpoints/     read by `--resume`
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from qlora_cli.common.atomic_files import atomic_folder, replace_file, unfinished_of
from qlora_cli.common.digests import refuse_damaged, write_digests
from qlora_cli.common.untrusted_files import read_object, refuse_links
from qlora_cli.errors import Interrupted, RecipeError
from qlora_cli.models.identity import identify, refuse_other_base
from qlora_cli.recipe.load import load_recipe
from qlora_cli.recipe.schema import Recipe

Weights = Literal["last", "best"]

_PACKAGES = (
    "qlora",
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "accelerate",
    "datasets",
    "tokenizers",
    "safetensors",
)


class RunFolder:
    """Paths and small files of one run."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.recipe = root / "recipe.yaml"
        self.record = root / "run.json"
        self.checkpoints = root / "checkpoints"
        self.answers = root / "answers.jsonl"

    def start(self, *, resume: bool) -> None:
        """Create the folder, or reopen it to resume the run.

        Raises:
            RecipeError: the folder holds another run, or none that could be resumed.
            ModelError: a link in the folder points outside it, and files would be written there.
        """
        refuse_links(self.root)
        if resume and not self.record.exists():
            raise RecipeError(
                f"--resume: output.dir ({self.root}) holds no run", hint="start without --resume"
            )
        if not resume and self.record.exists():
            hint = "choose another folder (--set output.dir=...), or delete this one"
            if any(self.checkpoints.glob("step-*")):
                hint = f"continue it (--resume auto), {hint}"
            raise RecipeError(f"output.dir: {self.root} already holds a run", hint=hint)
        if self.root.exists() and not self.root.is_dir():
            raise RecipeError(f"output.dir: {self.root} is a file, not a folder")
        # The remains of a start that was killed before it wrote a record.
        ours = {self.root / ".lock", unfinished_of(self.record)}
        held = [path for path in self.root.glob("*") if path not in ours]
        if not resume and self.root.is_dir() and held:
            raise RecipeError(
                f"output.dir: {self.root} is not a run folder and holds files, which a run could "
                "overwrite",
                hint="use a folder that is empty or does not exist (--set output.dir=...)",
            )
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RecipeError(f"output.dir: {self.root}: {error.strerror}") from error

    @contextmanager
    def started(self, *, resume: bool, is_main: bool) -> Iterator[None]:
        """Create or reopen the folder. If the run fails before it has a record, remove it again.

        Args:
            is_main: this process writes the folder.

        Raises:
            RecipeError: as `start`.
            ModelError: as `start`.
            Interrupted: it says what is kept.
        """
        new = [path for path in (self.root, *self.root.parents) if not path.exists()]
        try:
            self.start(resume=resume)
            yield
        except Interrupted as why:
            if why.kept is not None and any(self.checkpoints.glob("step-*")):
                why.kept = (
                    f"the checkpoints in {self.checkpoints} are kept, and --resume auto continues "
                    "from the newest"
                )
            raise
        finally:
            if is_main and not self.record.exists():
                for path in new:
                    with suppress(OSError):  # others put files there meanwhile
                        path.rmdir()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the folder against other processes.

        Raises:
            RecipeError: another process holds the lock.
        """
        import filelock

        path = self.root / ".lock"
        try:
            # The system releases the lock of a process that dies.
            with filelock.FileLock(path, timeout=0):
                try:
                    yield
                finally:
                    path.unlink(missing_ok=True)
        except filelock.Timeout as error:
            raise RecipeError(
                f"output.dir: another process is training in {self.root}",
                hint="wait for it, stop it, or choose another folder (--set output.dir=...)",
            ) from error

    def weights(self, which: Weights) -> Path:
        """Find the folder of the trained weights, and verify its files.

        Raises:
            RecipeError: there are none.
            ModelError: a link in the run folder points outside it, or a file is damaged.
        """
        folder = self.find_weights(which)
        hint = "restore the file from a copy"
        if any(self.checkpoints.glob("step-*")):
            again = f"qlora train {shlex.quote(str(self.recipe))} --resume auto"
            hint += f", or {again} writes last/ again from the newest checkpoint"
        if which == "best" and folder.name == which:
            hint += ", or take --weights last"
        refuse_damaged(folder, hint=hint)
        return folder

    def find_weights(self, which: Weights) -> Path:
        """Find the folder of the trained weights. Its files are not read.

        Raises:
            RecipeError: there are none.
            ModelError: a link in the run folder points outside it.
        """
        refuse_links(self.root)
        # A combined adapter is a run with one set of weights, next to its record.
        if (self.root / "adapter_config.json").is_file():
            return self.root
        folder = self.root / which
        if not folder.is_dir():
            reason, hint = "the run has not finished", self.ways_to_finish()
            if not any(self.checkpoints.glob("step-*")):
                reason = "the run ended before its first checkpoint"
                hint = f"delete {self.root}, and start the run again"
            if self.record.exists() and self.read_record().get("status") == "failed":
                reason = "no step of the run was applied"
                hint = f"delete {self.root}, and start the run again with other settings"
            if which == "best" and (self.root / "last").is_dir():
                reason, hint = "the run was not evaluated after its first step", "--weights last"
            raise RecipeError(f"{folder} does not exist: {reason}", hint=hint)
        return folder

    def ways_to_finish(self) -> str:
        """Name the commands that give a stopped run its last weights: after all steps, or now."""
        command = f"qlora train {shlex.quote(str(self.recipe))} --resume auto"
        steps = [path.name.removeprefix("step-") for path in self.checkpoints.glob("step-*")]
        newest = max([int(step) for step in steps if step.isdecimal()], default=0)
        if not newest:
            return f"{command} finishes it"
        training = (self.read_record().get("recipe") or {}).get("training") or {}
        epochs = " --set training.epochs=null" if training.get("epochs") is not None else ""
        return (
            f"{command} finishes it; {command}{epochs} --set training.max_steps={newest} writes "
            "the weights after its newest checkpoint, without further steps"
        )

    def replace(self, which: Weights, write: Callable[[Path], None]) -> None:
        """Write a folder of weights next to the old one, then exchange them."""
        with atomic_folder(self.root / which, replace=True) as unfinished:
            write(unfinished)
            write_digests(unfinished)

    def available_bytes(self) -> int:
        """Bytes that the run may use on this disk: free ones, and those of its own weights."""
        parts = (self.checkpoints, *(self.root / name for name in get_args(Weights)))
        files = (file for part in parts for file in part.rglob("*") if file.is_file())
        held: int = sum(file.stat().st_size for file in files)
        return shutil.disk_usage(self.root).free + held

    def read_record(self) -> dict[str, Any]:
        """Read run.json.

        Raises:
            RecipeError: this is not a run folder.
        """
        try:
            return read_object(self.record)
        except (OSError, ValueError) as error:
            raise RecipeError(f"{self.root} is not a run folder: {error}") from error

    def trained_with_tools(self) -> bool:
        """Tell if all training rows declared tools. Records of earlier versions do not say."""
        rows = (self.read_record().get("data") or {}).get("training") or {}
        num_used = rows.get("num_rows", 0) - rows.get("num_lost", 0)
        return bool(num_used) and rows.get("num_with_tools") == num_used

    def update_record(self, **values: object) -> None:
        """Add values to run.json, atomically."""
        known = self.read_record() if self.record.exists() else {}
        replace_file(self.record, json.dumps({**known, **values}, indent=2) + "\n")

    def write_readme(self) -> None:
        """Write the README.md of the run folder."""
        record = self.read_record()
        best = record.get("best")
        lines = [
            f"# Run {self.root.name}",
            "",
            f"{record['steps']} steps, {record['tokens']:,} tokens, "
            f"{record['trained_weights']:,} of {record['total_weights']:,} weights trained, "
            f"{record['seconds']:,.0f} s.",
            "",
            "| file | content |",
            "|---|---|",
            "| last/ | weights after the last step, with tokenizer and chat template |",
        ]
        if best is not None:
            which = f"best {best['by']}, {best['value']:.4f} at step {best['step']}"
            lines.append(f"| best/ | weights with the {which} |")
        lines += [
            "| recipe.yaml | the recipe, every value written out |",
            "| run.json | versions, seed, data digests, counts |",
            "| metrics.jsonl | one JSON object per logged step |",
            "| checkpoints/ | read by `qlora train --resume auto` |",
            "",
            "```bash",
            *([f"qlora eval {shlex.quote(str(self.root))}"] if record["tasks"] else []),
            f"qlora merge {shlex.quote(str(self.root))} "
            f"--output {shlex.quote(str(self.root / 'merged'))}",
            "```",
            "",
        ]
        replace_file(self.root / "README.md", "\n".join(lines))


def is_run(path: Path) -> bool:
    """Return whether a path is a run folder."""
    return (path / "run.json").is_file()


def environment() -> dict[str, Any]:
    """Collect versions, hardware and the git commit of the working directory."""

    return {
        "commit": _commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "cpu": str(torch.cpu.get_capabilities().get("cpu_name", platform.machine())),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def _commit() -> str | None:
    """The commit of the working directory's git repository, with `-dirty` if files differ."""
    # The repository's own settings could name a program to run.
    command = ["git", "-c", "core.fsmonitor=false", "describe", "--always", "--dirty"]
    command += ["--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def recipe_of_run(run: RunFolder, overrides: Sequence[str] = ()) -> Recipe:
    """Load the recipe of a run, with overrides.

    Raises:
        ModelError: the base model is not the one that the run was trained on.
    """
    recipe = load_recipe(run.recipe, overrides).recipe
    trained_on = load_recipe(run.recipe).recipe.model.path
    here = identify(recipe.model.locate())
    known = run.read_record().get("base")
    refuse_other_base(run.root, known, trained_on, recipe.model.path, here)
    return recipe
