"""Where an adapter lies, and what is known of it: by itself, or as what a run trained."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

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
    """As the user named it."""
    folder: Path
    """With its config and tensors."""
    run: RunFolder | None
    """The run that trained it."""

    @classmethod
    def find(cls, path: Path, weights: Weights = "last") -> AdapterFolder:
        """The adapter of a run, or of a folder.

        Raises:
            RecipeError: there is none.
            ModelError: something in its folder leads out of it.
        """
        run = _run_of(path)
        folder = run.weights(weights) if run is not None and run.root == path else path
        if not (folder / CONFIG).is_file():
            raise RecipeError(
                f"{path}: no adapter ({folder / CONFIG} does not exist)",
                hint="name the folder of a run, or one with an adapter in PEFT's format",
            )
        refuse_foreign(folder)
        return cls(path, folder, run)

    def config(self) -> dict[str, Any]:
        """Its settings.

        Raises:
            RecipeError: they cannot be read.
        """
        try:
            return read_object(self.folder / CONFIG)
        except (OSError, ValueError) as error:
            raise RecipeError(f"{self.folder / CONFIG} cannot be read: {error}") from error

    def base_path(self) -> str:
        """What it calls its base model."""
        return str(self.config().get("base_model_name_or_path") or "")

    def base_identity(self) -> dict[str, str] | None:
        """Architecture and digest of its base (`model/identity.py`); None if nobody knows."""
        return self.run.read_record().get("base") if self.run else None

    def recipe(self) -> Recipe | None:
        """Of the run that trained it."""
        return load_recipe(self.run.recipe).recipe if self.run else None

    def check_base(self, recipe: Recipe, here: Mapping[str, str]) -> None:
        """Refuse it over the base of a recipe, or warn, as far as is known on what it was trained.

        Args:
            here: what `identify` says of the recipe's base.

        Raises:
            ModelError: it was trained on other weights.
        """
        known = self.base_identity()
        refuse_other_base(self.path, known, self.base_path(), recipe.model.path, here)
        if known is None and self.base_path() != recipe.model.path:
            log.warning(
                "%s names %s as its base, and here is %s: whether the weights are the same is not "
                "known",
                self.path,
                self.base_path() or "nothing",
                recipe.model.path,
            )
        trained = self.recipe()
        if trained is not None and trained.quantization != recipe.quantization:
            log.warning(
                "%s was trained over a base in quantization.type %s, and here it is %s",
                self.path,
                trained.quantization.type,
                recipe.quantization.type,
            )


def is_adapter(path: Path) -> bool:
    """Whether a path is a folder with an adapter of its own."""
    return (path / CONFIG).is_file()


def _run_of(path: Path) -> RunFolder | None:
    """The run whose folder this is, or in which it lies."""
    whole = path.absolute()
    if not is_run(path) and whole.name in get_args(Weights) and is_run(whole.parent):
        return RunFolder(whole.parent)
    return RunFolder(path) if is_run(path) else None
