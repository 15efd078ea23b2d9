"""Optional packages that a recipe needs."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

from qlora_cli.errors import RecipeError
from qlora_cli.recipe.schema import Recipe
from qlora_cli.tasks import ChrF, Rouge


def require_packages(recipe: Recipe, *, for_tasks: bool) -> None:
    """Refuse a recipe that needs a package which is not installed.

    Args:
        for_tasks: the tasks will be asked too.

    Raises:
        RecipeError: with all packages that are missing.
    """
    missing = [
        (key, package, install)
        for key, module, package, install in _needs(recipe, for_tasks=for_tasks)
        if importlib.util.find_spec(module) is None
    ]
    if missing:
        raise RecipeError(
            "\n".join(
                f"{key} needs the package {package}, which is not installed"
                for key, package, _ in missing
            ),
            hint=" and ".join(f"pip install {install}" for _, _, install in missing),
        )


def _needs(recipe: Recipe, *, for_tasks: bool) -> Iterator[tuple[str, str, str, str]]:
    """Yield key, module, package, and what `pip install` takes."""
    if "tensorboard" in recipe.output.trackers:
        key = "output.trackers (tensorboard)"
        yield key, "tensorboard", "tensorboard", '"qlora[tensorboard]"'
    # transformers takes the kernels of the Hub in its place.
    has_kernels = importlib.util.find_spec("kernels") is not None
    if recipe.model.attention == "flash_attention_2" and not has_kernels:
        yield "model.attention (flash_attention_2)", "flash_attn", "flash-attn", "flash-attn"
    for task in recipe.evaluation.tasks if for_tasks else ():
        if isinstance(task, Rouge):
            yield "evaluation.tasks (rouge)", "rouge_score", "rouge-score", '"qlora[scores]"'
        if isinstance(task, ChrF):
            yield "evaluation.tasks (chrf)", "sacrebleu", "sacrebleu", '"qlora[scores]"'
