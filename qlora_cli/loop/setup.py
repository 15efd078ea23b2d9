"""Build everything that a training step needs: one line per setting of the recipe."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlora_cli.data.batching.sampler import BatchStream, eval_batches
from qlora_cli.data.prepared.prepare import PreparedData
from qlora_cli.recipe.schema import Recipe
from qlora_cli.types import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def stream_batches(
    recipe: Recipe,
    training: PreparedData,
    tokenizer: PreTrainedTokenizerFast,
    *,
    padding_free: bool,
    rank: int = 0,
    world_size: int = 1,
) -> BatchStream:
    """Build the stream of training micro-batches of one rank.

    Args:
        padding_free: put the examples of a micro-batch into one row, one after the other, instead
            of padding them.
    """
    settings, weights = recipe.training, [source.weight for source in recipe.data.train_sources]
    return BatchStream(
        training.examples,
        batch_size=settings.batch_size,
        micro_batch_size=settings.rows_per_forward,
        seed=settings.seed,
        epochs=settings.passes,
        pad_token_id=tokenizer.pad_token_id,
        parts=list(zip(training.examples.num_by_source(len(weights)), weights, strict=True)),
        max_length=recipe.data.max_length if recipe.data.packing else None,
        padding=not padding_free,
        rank=rank,
        world_size=world_size,
    )


def largest_eval_batch(
    evaluation: PreparedData | None, batch_size: int, tokenizer: PreTrainedTokenizerFast
) -> Batch | None:
    """Return the evaluation batch that needs the most memory (the first); None without rows."""
    if evaluation is None:
        return None
    pad_token_id = tokenizer.pad_token_id
    return next(eval_batches(evaluation.examples, batch_size=batch_size, pad_token_id=pad_token_id))
