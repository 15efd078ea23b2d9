"""What a run leaves behind: a folder that explains itself.

RUN/
├── README.md        what this is, in words, with the commands that use it
├── recipe.yaml      the resolved recipe; `qlora train` on it repeats the run
├── run.json         versions, seeds, digests, counts, results
├── metrics.jsonl    one object a line
├── answers.jsonl    what `qlora eval` asked, one example a line, with the answers
├── last/ best/      the trained adapter (PEFT's format) or model, with its tokenizer
└── checkpoints/     what `--resume` goes on from
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from qlora_cli.common.atomic_files import atomic_folder, replace_file, unfinished_of
from qlora_cli.common.untrusted_files import read_object, refuse_links
from qlora_cli.errors import RecipeError
from qlora_cli.models.identity import identify, refuse_other_base
from qlora_cli.recipe.load import load_recipe
from qlora_cli.recipe.schema import Recipe

if TYPE_CHECKING:
    pass

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
        """Make the folder, or take it up again.

        Raises:
            RecipeError: it holds another run, or nothing that could be resumed.
            ModelError: a link in it leads out: what is written would be written elsewhere.
        """
        refuse_links(self.root)
        if resume and not self.record.exists():
            raise RecipeError(
                f"--resume: output.dir ({self.root}) holds no run", hint="start without --resume"
            )
        if not resume and self.record.exists():
            hint = "choose another (--set output.dir=...), or remove the folder"
            if any(self.checkpoints.glob("step-*")):
                hint = f"go on with it (--resume auto), {hint}"
            raise RecipeError(f"output.dir: {self.root} already holds a run", hint=hint)
        if self.root.exists() and not self.root.is_dir():
            raise RecipeError(f"output.dir: {self.root} is a file, and a folder is needed")
        # All that a start leaves which was killed before it had written a record.
        ours = {self.root / ".lock", unfinished_of(self.record)}
        held = [path for path in self.root.glob("*") if path not in ours]
        if not resume and self.root.is_dir() and held:
            raise RecipeError(
                f"output.dir: {self.root} holds files that are of no run, and a run would write "
                "beside them and over them",
                hint="name a folder that is empty or does not exist (--set output.dir=...)",
            )
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RecipeError(f"output.dir: {self.root}: {error.strerror}") from error

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from writing here.

        Raises:
            RecipeError: another process does.
        """
        import filelock

        path = self.root / ".lock"
        try:
            # The system takes it from a process that dies.
            with filelock.FileLock(path, timeout=0):
                yield
                path.unlink(missing_ok=True)
        except filelock.Timeout as error:
            raise RecipeError(
                f"output.dir: another process is training in {self.root}",
                hint="wait for it or end it, or choose another folder (--set output.dir=...)",
            ) from error

    def weights(self, which: Weights) -> Path:
        """Folder of the trained weights.

        Raises:
            RecipeError: there are none.
            ModelError: a link in the run's folder leads out of it.
        """
        refuse_links(self.root)
        # Adapters that were combined are a run with one set of weights, beside its record.
        if (self.root / "adapter_config.json").is_file():
            return self.root
        folder = self.root / which
        if not folder.is_dir():
            reason, hint = "the run has not finished", f"qlora train {self.recipe} --resume auto"
            if not any(self.checkpoints.glob("step-*")):
                reason = "the run was cut short before its first checkpoint"
                hint = f"remove {self.root}, and start it again"
            if which == "best" and (self.root / "last").is_dir():
                reason, hint = "the run was not evaluated after its first step", "--weights last"
            raise RecipeError(f"{folder} does not exist: {reason}", hint=hint)
        return folder

    def replace(self, which: Weights, write: Callable[[Path], None]) -> None:
        """Write a folder of weights next to the old one, then exchange them."""
        with atomic_folder(self.root / which, replace=True) as unfinished:
            write(unfinished)

    def room(self) -> int:
        """Bytes that the run can have on this disk: what is free, and what it has already."""
        parts = (self.checkpoints, *(self.root / name for name in get_args(Weights)))
        files = (file for part in parts for file in part.rglob("*") if file.is_file())
        held: int = sum(file.stat().st_size for file in files)
        return shutil.disk_usage(self.root).free + held

    def read_record(self) -> dict[str, Any]:
        """What `update_record` wrote.

        Raises:
            RecipeError: this is no run folder.
        """
        try:
            return read_object(self.record)
        except (OSError, ValueError) as error:
            raise RecipeError(f"{self.root} is no run folder: {error}") from error

    def update_record(self, **values: object) -> None:
        """Add to `run.json`, whole or not at all."""
        known = self.read_record() if self.record.exists() else {}
        replace_file(self.record, json.dumps({**known, **values}, indent=2) + "\n")

    def write_readme(self) -> None:
        """A page for whoever finds the folder."""
        record = self.read_record()
        best = record.get("best")
        lines = [
            f"# Run {self.root.name}",
            "",
            f"{record['steps']} steps, {record['tokens']:,} tokens, "
            f"{record['trained_weights']:,} of {record['total_weights']:,} weights trained, "
            f"{record['seconds']:,.0f} s.",
            "",
            "| file | what |",
            "|---|---|",
            "| last/ | weights after the last step, with tokenizer and chat template |",
        ]
        if best is not None:
            which = f"best {best['by']}, {best['value']:.4f} at step {best['step']}"
            lines.append(f"| best/ | weights with the {which} |")
        lines += [
            "| recipe.yaml | the recipe, every value written out |",
            "| run.json | versions, seed, data digests, counts |",
            "| metrics.jsonl | one JSON object for each logged step |",
            "| checkpoints/ | what `qlora train --resume auto` goes on from |",
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
    """Whether a path is a run folder."""
    return (path / "run.json").is_file()


def environment() -> dict[str, Any]:
    """Versions and hardware, for the record; and the commit of the user's own files."""

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
    """Of the git repository that the current folder is in, `-dirty` if files differ from it."""
    # A repository's own settings may name a program to run.
    command = ["git", "-c", "core.fsmonitor=false", "describe", "--always", "--dirty"]
    command += ["--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def recipe_of_run(run: RunFolder, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a run, with what the user changes of it.

    Raises:
        ModelError: its model is not the one that the run was trained on.
    """
    recipe = load_recipe(run.recipe, overrides).recipe
    trained_on = load_recipe(run.recipe).recipe.model.path
    here = identify(recipe.model.locate())
    known = run.read_record().get("base")
    refuse_other_base(run.root, known, trained_on, recipe.model.path, here)
    return recipe
