"""The files of a comparison, from which its report is made.

OUT/
├── comparison.json   the report
├── comparison.html   the report as a page, with plots
├── study.log         the Optuna study (with --search)
├── runs/CELL/        a normal run folder
├── measured/CELL.json, CELL.answers.json, CELL.failed.json
└── bases/NAME.json   outcomes of the base, as some cells quantize it
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_cli.common.atomic_files import replace_file
from qlora_cli.common.hashing import hash_json
from qlora_cli.errors import RecipeError
from qlora_cli.objectives import SUPERVISED
from qlora_cli.recipe.schema import Recipe
from qlora_cli.runs.resume_check import compare, recorded_recipe
from qlora_cli.runs.run_folder import RunFolder, is_run
from qlora_cli.tasks.task import Outcome, TaskOutcomes

if TYPE_CHECKING:
    from qlora_cli.compare.grid import Cell


class ResultStore:
    """The files of one cell.

    Args:
        root: folder of the comparison.
    """

    def __init__(self, root: Path, cell: Cell) -> None:
        self.run = RunFolder(root / "runs" / cell.slug)
        self._measured = root / "measured"
        self._slug = cell.slug
        # A head that scores rows writes no text.
        predicts_tokens = cell.recipe is None or cell.recipe.objective.head is None
        self._speaks = cell.with_latency and predicts_tokens
        self._base = root / "bases" / f"{_base_name(cell.recipe)}.json" if cell.recipe else None

    @property
    def base_name(self) -> str | None:
        """Name of the base as this cell quantizes it; None if the cell has no recipe."""
        return self._base.stem if self._base else None

    @property
    def has_base(self) -> bool:
        """True if the base, as this cell quantizes it, has been evaluated."""
        return self._base is not None and self._base.is_file()

    def record(self) -> dict[str, Any]:
        """Read run.json; empty before the run starts."""
        return self.run.read_record() if is_run(self.run.root) else {}

    def metrics(self) -> list[dict[str, Any]]:
        """Read metrics.jsonl, without a line that is still being written."""
        path = self.run.root / "metrics.jsonl"
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        return [json.loads(line) for line in text.splitlines(True) if line.endswith("\n")]

    def measurements(self) -> dict[str, Any] | None:
        """Read plan, generation speed and sizes; None before they were measured."""
        return _read(self._file(""))

    def save_measurements(self, measurements: Mapping[str, Any]) -> None:
        """Save plan, generation speed and sizes."""
        _write(self._file(""), measurements)

    def failure(self) -> dict[str, Any] | None:
        """Read why the cell failed, if it did."""
        return _read(self._file(".failed"))

    def save_failure(self, failure: Mapping[str, Any] | None) -> None:
        """Save why the cell failed; None removes an earlier failure."""
        if failure is None:
            self._file(".failed").unlink(missing_ok=True)
        else:
            _write(self._file(".failed"), failure)

    def answers(self, *, of_base: bool = False) -> TaskOutcomes | None:
        """Read the outcomes of each task, without texts; None before the evaluation."""
        known = _read(self._answers(of_base))
        if known is None:
            return None
        return {
            task: [Outcome(place, "", "", "", values) for place, values in rows]
            for task, rows in known.items()
        }

    def save_outcomes(self, answers: TaskOutcomes, *, of_base: bool = False) -> None:
        """Save the outcomes of each task, without texts."""
        rows = {task: [[o.place, o.values] for o in found] for task, found in answers.items()}
        _write(self._answers(of_base), rows)

    @property
    def is_done(self) -> bool:
        """True if nothing is left to do."""
        measurements = self.measurements()
        if measurements is None or self.answers() is None:
            return False
        return not self._speaks or measurements["generation"] is not None

    def refuse_other(self, recipe: Recipe) -> None:
        """Raise RecipeError if the cell was run with another recipe."""
        if not is_run(self.run.root):
            return
        old, new = (one.model_dump(mode="json") for one in (recorded_recipe(self.run), recipe))
        changes = {k: v for k, v in compare(old, new).items() if not k.startswith("output.")}
        # The run has recorded the value that `auto` chose.
        if recipe.training.micro_batch_size == "auto" and self.record()["is_micro_batch_auto"]:
            changes.pop("training.micro_batch_size", None)
        if changes:
            lines = [f"{key}: {before} -> {now}" for key, (before, now) in changes.items()]
            raise RecipeError(
                "\n".join([f"--out: {self.run.root} was run with other settings", *lines]),
                hint="compare into another folder, or remove this one",
            )

    def _file(self, suffix: str) -> Path:
        return self._measured / f"{self._slug}{suffix}.json"

    def _answers(self, of_base: bool) -> Path:
        if of_base:
            assert self._base is not None, "a cell without a recipe is not run"
            return self._base
        return self._file(".answers")


def _base_name(recipe: Recipe) -> str:
    """Name the base of a recipe. Cells with equal bases share its outcomes."""
    document = recipe.model_dump(mode="json")
    keys = ("model", "quantization", "data", "evaluation")
    values = [*(document[key] for key in keys), recipe.training.precision]
    if recipe.objective != SUPERVISED:  # it decides what is measured of the base
        values.append(document["objective"])
    digest = hash_json(values)
    changed = recipe.quantization.model_dump(mode="json", exclude_defaults=True)
    settings = [f"{key}={value}" for key, value in changed.items()]
    return "-".join([recipe.quantization.type, *settings, digest[:6]])


def _read(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _write(path: Path, value: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, json.dumps(value))
