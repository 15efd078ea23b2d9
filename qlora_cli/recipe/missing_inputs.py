"""Files and folders that a recipe reads, and which of them are not on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_cli.adapters import LoRA
from qlora_cli.common.user_paths import missing_path_hint

if TYPE_CHECKING:
    from qlora_cli.data.sources import Source
    from qlora_cli.recipe.schema import Recipe


@dataclass(frozen=True, slots=True)
class RecipeInput:
    """A path that a recipe reads."""

    key: str
    """Dotted key in the recipe."""
    path: str
    is_missing: bool
    """The path is meant to be local, and there is nothing."""

    def problem(self, folder: Path | None = None) -> str:
        """Say that the path is missing, and what it may have meant.

        Args:
            folder: folder of the recipe.
        """
        text = f'{self.key}: found "{self.path}", and there is no such file or folder'
        if folder is not None and not Path(self.path).is_absolute():
            beside = folder / self.path
            if beside.exists():
                return (
                    f"{text} in the current folder, {Path.cwd()}; did you mean {beside}, beside "
                    "the recipe?"
                )
        return f"{text}; {missing_path_hint(self.path)}"


def recipe_inputs(recipe: Recipe) -> Iterator[RecipeInput]:
    """Yield each path that a recipe reads, in the order of its sections."""
    model, adapter, data = recipe.model, recipe.adapter, recipe.data
    yield RecipeInput("model.path", model.path, model.is_missing())
    if isinstance(adapter, LoRA) and adapter.init_from is not None:
        yield _file("adapter.init_from", adapter.init_from)
    yield from _sources("data.train", data.train)
    yield from _sources("data.evaluation", data.evaluation or [])
    if data.chat_template is not None:
        yield _file("data.chat_template", data.chat_template)
    for i, task in enumerate(recipe.evaluation.tasks):
        yield from _sources(f"evaluation.tasks[{i}].data", task.data or [])
    yield from _sources("evaluation.forgetting", recipe.evaluation.forgetting or [])


def missing_inputs(recipe: Recipe) -> list[RecipeInput]:
    """Return the local files and folders that a recipe reads, and that are not on this machine."""
    return [found for found in recipe_inputs(recipe) if found.is_missing]


def _file(key: str, path: str) -> RecipeInput:
    return RecipeInput(key, path, not Path(path).exists())


def _sources(key: str, sources: Source | list[Source]) -> Iterator[RecipeInput]:
    if not isinstance(sources, list):
        yield RecipeInput(f"{key}.path", sources.path, sources.is_missing())
        return
    for i, source in enumerate(sources):
        yield RecipeInput(f"{key}[{i}].path", source.path, source.is_missing())
