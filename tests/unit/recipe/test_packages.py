"""Packages that a recipe needs are asked for before anything is prepared."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import pytest

from qlora_cli.errors import RecipeError
from qlora_cli.recipe.load import LoadedRecipe
from qlora_cli.recipe.packages import require_packages

NEEDS = {
    "tensorboard": ("output.trackers=[tensorboard]", 'pip install "qlora[tensorboard]"'),
    "flash_attn": ("model.attention=flash_attention_2", "pip install flash-attn"),
    "rouge_score": (
        "evaluation.tasks=[{type: rouge, data: {path: x.jsonl}}]",
        'pip install "qlora[scores]"',
    ),
    "sacrebleu": (
        "evaluation.tasks=[{type: chrf, data: {path: x.jsonl}}]",
        'pip install "qlora[scores]"',
    ),
}


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    missing = {*NEEDS, "kernels"}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in missing else found(name)
    )


@pytest.mark.usefixtures("nothing_installed")
@pytest.mark.parametrize(("override", "install"), NEEDS.values(), ids=NEEDS)
def test_a_missing_package_is_refused(
    load: Callable[..., LoadedRecipe], minimal: str, override: str, install: str
) -> None:
    recipe = load(minimal, override).recipe
    with pytest.raises(RecipeError, match="which is not installed") as caught:
        require_packages(recipe, for_tasks=True)
    assert caught.value.hint == install
    assert str(caught.value).startswith(override.split("=")[0])
    if recipe.evaluation.tasks:
        require_packages(recipe, for_tasks=False)


@pytest.mark.usefixtures("nothing_installed")
def test_all_that_is_missing_is_said_at_once(
    load: Callable[..., LoadedRecipe], minimal: str
) -> None:
    overrides = [override for override, _ in list(NEEDS.values())[:3]]
    with pytest.raises(RecipeError) as caught:
        require_packages(load(minimal, *overrides).recipe, for_tasks=True)
    assert len(str(caught.value).splitlines()) == 3


def test_nothing_is_asked_of_a_plain_recipe(
    load: Callable[..., LoadedRecipe], minimal: str
) -> None:
    require_packages(load(minimal).recipe, for_tasks=True)
