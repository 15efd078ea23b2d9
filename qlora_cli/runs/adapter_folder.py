"""Find an adapter: a folder in PEFT's format, or the trained weights of a run."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from qlora_cli.common.digests import refuse_damaged
from qlora_cli.common.untrusted_files import read_object, refuse_foreign
from qlora_cli.errors import RecipeError
from qlora_cli.models.identity import refuse_other_base
from qlora_cli.recipe.load import load_recipe
from qlora_cli.recipe.schema import Recipe
from qlora_cli.runs.run_folder import RunFolder, Weights, is_run

log = logging.getLogger("qlora")

CONFIG = "adapter_config.json"


@dataclass(frozen=True, slots=True)
class AdapterFolder:
    """An adapter in PEFT's format."""

    path: Path
    """The path that the user gave."""
    folder: Path
    """The folder with adapter_config.json and the tensors."""
    run: RunFolder | None
    """The run that trained it, if known."""

    @classmethod
    def find(cls, path: Path, weights: Weights = "last") -> AdapterFolder:
        """Find the adapter of a run, or in a folder, and verify its files.

        Raises:
            RecipeError: there is no adapter.
            ModelError: a link in the folder points outside it, or a file is damaged.
        """
        adapter = cls.find_unread(path, weights)
        if adapter.run is None:
            refuse_damaged(adapter.folder)
        else:
            name = adapter.folder.absolute().name
            adapter.run.weights("best" if name == "best" else "last")
        return adapter

    @classmethod
    def find_unread(cls, path: Path, weights: Weights = "last") -> AdapterFolder:
        """Find the adapter of a run, or in a folder. Its weights are not read.

        Raises:
            RecipeError: there is no adapter.
            ModelError: a link in the folder points outside it.
        """
        run = run_of(path)
        folder = path
        if run is not None and run.root == path:
            folder = run.find_weights(weights)
        elif run is not None and not path.exists():
            folder = run.find_weights("best" if path.absolute().name == "best" else "last")
        if not (folder / CONFIG).is_file():
            raise RecipeError(
                f"{path}: no adapter ({folder / CONFIG} does not exist)",
                hint="name the folder of a run, or one with an adapter in PEFT's format",
            )
        refuse_foreign(folder)
        return cls(path, folder, run)

    def config(self) -> dict[str, Any]:
        """Read adapter_config.json.

        Raises:
            RecipeError: it cannot be read.
        """
        try:
            return read_object(self.folder / CONFIG)
        except (OSError, ValueError) as error:
            raise RecipeError(f"{self.folder / CONFIG} cannot be read: {error}") from error

    def base_path(self) -> str:
        """Return the base model's name in adapter_config.json; empty if there is none."""
        return str(self.config().get("base_model_name_or_path") or "")

    def base_identity(self) -> dict[str, str] | None:
        """Return architecture and digest of the base (see `models/identity.py`), if recorded."""
        return self.run.read_record().get("base") if self.run else None

    def recipe(self) -> Recipe | None:
        """Load the recipe of the run that trained it."""
        return load_recipe(self.run.recipe).recipe if self.run else None

    def check_base(self, recipe: Recipe, here: Mapping[str, str]) -> None:
        """Refuse the base of a recipe if the adapter was trained on another; warn if unknown.

        Args:
            here: the identity of the recipe's base, from `identify`.

        Raises:
            ModelError: the adapter was trained on other weights.
        """
        known = self.base_identity()
        refuse_other_base(self.path, known, self.base_path(), recipe.model.path, here)
        if known is None and self.base_path() != recipe.model.path:
            log.warning(
                "%s was trained on %s, and the base here is %s: it is unknown whether the weights "
                "are the same",
                self.path,
                self.base_path() or "an unnamed base",
                recipe.model.path,
            )
        trained = self.recipe()
        if trained is not None and trained.quantization != recipe.quantization:
            log.warning(
                "%s was trained with quantization.type %s, and here it is %s",
                self.path,
                trained.quantization.type,
                recipe.quantization.type,
            )


def is_adapter(path: Path) -> bool:
    """Return whether a folder has an adapter in PEFT's format."""
    return (path / CONFIG).is_file()


def run_of(path: Path) -> RunFolder | None:
    """Return the run of this folder, or of its parent (for RUN/last and RUN/best)."""
    full = path.absolute()
    if not is_run(path) and full.name in get_args(Weights) and is_run(full.parent):
        return RunFolder(full.parent)
    return RunFolder(path) if is_run(path) else None
