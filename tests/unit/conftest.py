"""Recipes as text, read as a user's file is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_cli.errors import RecipeError
from qlora_cli.recipe.load import LoadedRecipe, load_recipe

MINIMAL = """\
model: {path: base}
data: {train: {path: rows.jsonl}}
output: {dir: run}
"""


@pytest.fixture
def minimal() -> str:
    """The shortest recipe."""
    return MINIMAL


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., LoadedRecipe]:
    """Write text to recipe.yaml in the working folder and load it."""
    monkeypatch.chdir(tmp_path)

    def load(text: str, *overrides: str) -> LoadedRecipe:
        Path("recipe.yaml").write_text(text, encoding="utf-8")
        return load_recipe(Path("recipe.yaml"), overrides)

    return load


@pytest.fixture
def problems(load: Callable[..., LoadedRecipe]) -> Callable[..., list[str]]:
    """Load text that is wrong, and return the lines of the error."""

    def problems(text: str, *overrides: str) -> list[str]:
        with pytest.raises(RecipeError) as caught:
            load(text, *overrides)
        lines = str(caught.value).splitlines()
        return lines if len(lines) == 1 else lines[1:]

    return problems
