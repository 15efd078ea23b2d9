"""The batches that determine the memory and time of a run."""

from __future__ import annotations

from dataclasses import dataclass

from qlora_cli.data.batching.collate import full_batch
from qlora_cli.loop.run_data import RecipeData, read_recipe_data
from qlora_cli.loop.setup import evaluation_batches, stream_batches
from qlora_cli.recipe.schema import Recipe
from qlora_cli.types import Batch


@dataclass(frozen=True)
class PlanRows:
    """The batches of a run that determine its memory and time."""

    steps: list[list[Batch]]
    """The micro-batches of the steps that need the most memory."""
    held_out: Batch | None
    """The largest evaluation batch."""
    num_steps: int | None
    tokens: int | None
    """Tokens of all steps, without padding."""
    origin: str
    """Source of these figures."""
    longest: int
    """Tokens of the longest example."""


def read_available(recipe: Recipe) -> RecipeData | None:
    """Read the data of a recipe; None if something of it would have to be downloaded."""
    return None if missing_locally(recipe) else read_recipe_data(recipe)


def find_rows(
    recipe: Recipe, data: RecipeData | None, *, padding_free: bool, gpus: int = 1
) -> PlanRows:
    """Find the largest batches of the data, or assume full rows if the data is not available.

    Args:
        data: what `read_available` returned.
        padding_free: concatenate examples instead of padding them.
        gpus: number of devices that share a step.
    """
    if data is None:
        return assume_rows(recipe, missing_locally(recipe), padding_free=padding_free)
    batches = stream_batches(
        recipe,
        data.training,
        data.tokenizer,
        padding_free=padding_free,
        shares_prefixes=padding_free and recipe.model.attention in ("auto", "sdpa"),
        world_size=gpus,
    )
    num_steps = recipe.training.max_steps or batches.num_steps
    held_out = None
    if data.evaluation is not None:
        held_out = next(evaluation_batches(recipe, data.evaluation, data.tokenizer))
    tokens = batches.tokens(num_steps)
    steps = batches.largest(num_steps)
    return PlanRows(steps, held_out, num_steps, tokens, "the data", data.longest)


def missing_locally(recipe: Recipe) -> str:
    """Name what must be downloaded to plan with the rows of a recipe; empty if nothing."""
    if not recipe.model.is_at_hand():
        return "the model's tokenizer is not available"
    sources = [*recipe.data.train_sources, *recipe.data.evaluation_sources]
    missing = [source.path for source in sources if not source.is_at_hand()]
    return f"{missing[0]} is not available" if missing else ""


def assume_rows(recipe: Recipe, why: str, *, padding_free: bool) -> PlanRows:
    """Assume that every row has `data.max_length` tokens."""
    data, settings = recipe.data, recipe.training
    num_micro_batches = min(2, -(-settings.batch_size // settings.fixed_micro_batch_size))
    full = _full_batch(recipe, settings.fixed_micro_batch_size, padding_free=padding_free)
    held_out = None
    if data.evaluation_sources:
        held_out = _full_batch(recipe, recipe.eval_batch_size, padding_free=False)
    steps = settings.max_steps
    tokens = steps and steps * settings.batch_size * data.max_length
    origin = f"rows of data.max_length ({why})"
    longest = data.max_length
    return PlanRows([[full] * num_micro_batches], held_out, steps, tokens, origin, longest)


def _full_batch(recipe: Recipe, num_rows: int, *, padding_free: bool) -> Batch:
    objective = recipe.objective
    return full_batch(
        num_rows,
        recipe.data.max_length,
        padding_free=padding_free,
        link=objective.link_size,
        values=objective.example_values,
    )
