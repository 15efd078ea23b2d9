"""Find the model to evaluate from a path: a run, a model folder or a recipe."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_cli.common.formatting import first_names
from qlora_cli.data.render.chat_template import read_chat_template
from qlora_cli.errors import RecipeError
from qlora_cli.models.tokenizer import load_tokenizer
from qlora_cli.recipe.load import load_recipe
from qlora_cli.recipe.schema import Recipe
from qlora_cli.runs.run_folder import RunFolder, Weights, is_run, recipe_of_run

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True, slots=True)
class EvaluatedModel:
    """A base model, with or without trained weights on it."""

    name: str
    recipe: Recipe
    """How to load the model."""
    trained: Path | None = None
    """Folder of the trained weights; None for the base alone."""

    def load_tokenizer(self) -> PreTrainedTokenizerFast:
        """Load the tokenizer of the trained weights, or that of the base."""
        if self.trained is None:
            template = read_chat_template(self.recipe.data.chat_template)
            return self.recipe.model.load_tokenizer(template)
        return load_tokenizer(self.trained, trust_remote_code=self.recipe.model.trust_remote_code)


def own_recipe(path: Path) -> Path | None:
    """Return the recipe of a run, or a recipe itself; None for a model folder."""
    if is_run(path):
        return RunFolder(path).recipe
    return None if path.is_dir() or path.suffix == ".gguf" else path


def find_model(
    path: Path, overrides: Sequence[str], weights: Weights, recipe: Path | None
) -> EvaluatedModel:
    """Find the model that a path names.

    Args:
        path: a run, a model folder or a recipe.
        recipe: evaluation data and tasks for a model folder.

    Raises:
        RecipeError: the path is none of these, or a run without these weights.
    """
    if is_run(path):
        run = RunFolder(path)
        trained = run.weights(weights)
        return EvaluatedModel(path.resolve().name, recipe_of_run(run, overrides), trained)
    if not path.exists():
        raise RecipeError(f"{path}: no such file or folder")
    own = own_recipe(path)
    if own is not None:
        return EvaluatedModel("base", load_recipe(own, overrides).recipe)
    if path.is_dir() and not (path / "config.json").is_file():
        found = first_names(sorted(entry.name for entry in path.iterdir()), 8) or "nothing"
        raise RecipeError(
            f"{path} holds neither a run nor a model (found: {found})",
            hint="give the output.dir of a run, a model folder or a recipe; a run that failed "
            "before its first step leaves nothing to evaluate",
        )
    if recipe is None:
        raise RecipeError(
            f"{path} is a model folder, which has no evaluation data or tasks",
            hint="give a recipe that has them with --recipe",
        )
    # The model is evaluated as it is stored, unless --set asks for a quantization.
    place = f"model.path={json.dumps(str(path))}"
    loaded = load_recipe(recipe, ["quantization.type=none", *overrides, place])
    return EvaluatedModel(path.resolve().name, loaded.recipe)
