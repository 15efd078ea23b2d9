"""Evaluate a model while it trains."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from qlora_cli.data.batching.sampler import eval_batches
from qlora_cli.data.prepared.prepare import PreparedData
from qlora_cli.distributed.world import World
from qlora_cli.errors import TrainingError
from qlora_cli.objectives.supervised import TokenLoss, evaluate_loss

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def measure(
    objective: TokenLoss,
    evaluation: PreparedData,
    tokenizer: PreTrainedTokenizerFast,
    batch_size: int,
    world: World,
) -> dict[str, float]:
    """Measure loss (mean over all supervised tokens) and perplexity on the evaluation rows.

    Raises:
        TrainingError: the loss is not finite.
    """
    batches = eval_batches(
        evaluation.examples,
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
