"""What the stories build in the same way: data, base model, measurement."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from qlora_cli.data.batching.sampler import BatchStream, eval_batches
from qlora_cli.data.prepared.prepare import Prepared
from qlora_cli.distributed.world import World
from qlora_cli.errors import TrainingError
from qlora_cli.models.report import refuse_unquantized, report_weights
from qlora_cli.objectives.supervised import TokenLoss, evaluate_loss
from qlora_cli.recipe.schema import Recipe
from qlora_cli.tasks.task import Task, TaskPrompts
from qlora_cli.types import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

log = logging.getLogger("qlora")


def stream_batches(
    recipe: Recipe,
    learnt: Prepared,
    tokenizer: PreTrainedTokenizerFast,
    *,
    padding_free: bool,
    rank: int = 0,
    world_size: int = 1,
) -> BatchStream:
    """The micro-batches that a rank learns from, for any step.

    Args:
        is_flat: whether examples lie end to end rather than being padded.
    """
    settings, weights = recipe.training, [source.weight for source in recipe.data.train_sources]
    return BatchStream(
        learnt.examples,
        batch_size=settings.batch_size,
        micro_batch_size=settings.rows_per_forward,
        seed=settings.seed,
        epochs=settings.passes,
        pad_token_id=tokenizer.pad_token_id,
        parts=list(zip(learnt.examples.num_by_source(len(weights)), weights, strict=True)),
        max_length=recipe.data.max_length if recipe.data.packing else None,
        padding=not padding_free,
        rank=rank,
        world_size=world_size,
    )


def largest_eval_batch(
    held_out: Prepared | None, batch_size: int, tokenizer: PreTrainedTokenizerFast
) -> Batch | None:
    """The batch of an evaluation that needs the most memory: the first, if there is any."""
    if held_out is None:
        return None
    pad_token_id = tokenizer.pad_token_id
    return next(eval_batches(held_out.examples, batch_size=batch_size, pad_token_id=pad_token_id))


def read_tasks(
    recipe: Recipe, tasks: Sequence[Task], tokenizer: PreTrainedTokenizerFast
) -> TaskPrompts:
    """What each of the tasks asks.

    Raises:
        DataError: a row cannot be asked about, or has a reference that cannot be scored against.
    """
    held_out, limit = recipe.data.evaluation_sources, recipe.evaluation.limit
    exam: TaskPrompts = []
    for task in tasks:
        sources = held_out if task.data is None else [task.data]
        exam.append((task, task.questions(sources, tokenizer, recipe.data, limit=limit)))
    return exam


def compute_dtype(recipe: Recipe, world: World) -> torch.dtype:
    """What a step computes in here. Weights that are held in 16 bit are computed with in 16 bit,
    under autocast: float32 ones, which are trained beside them, would meet them in one product.

    Raises:
        RecipeError: it was asked for by name, and the device does not have it.
    """
    return recipe.quantization.compute_in(world.compute_dtype(recipe.training.precision))


def load_base(recipe: Recipe, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The base model as the recipe wants it held, with a line about it in the log."""
    if recipe.model.trust_remote_code:
        log.warning(
            "model.trust_remote_code: running code of %s at %s",
            recipe.model.path,
            recipe.model.revision,
        )
    model = recipe.model.load(recipe.quantization.load_options(dtype), device)
    weights = report_weights(model)
    log.info(weights.summary())
    refuse_unquantized(weights, recipe.quantization.max_unquantized)
    return model


def measure(
    objective: TokenLoss,
    held_out: Prepared,
    tokenizer: PreTrainedTokenizerFast,
    batch_size: int,
    world: World,
) -> dict[str, float]:
    """Loss (mean over all supervised tokens) and perplexity on held-out examples.

    Raises:
        TrainingError: the loss is not finite.
    """
    batches = eval_batches(
        held_out.examples,
        batch_size=batch_size,
        pad_token_id=tokenizer.pad_token_id,
        rank=world.rank,
        world_size=world.size,
    )
    totals = world.sum(evaluate_loss(objective, batches, world.device))
    loss = float(totals[0] / totals[1])
    if not math.isfinite(loss):
        raise TrainingError(f"the loss on held-out rows is {loss}: the weights are damaged")
    return {"eval_loss": loss, "eval_perplexity": math.exp(min(loss, 700.0))}
