"""What the stories build in the same way: data, base model, measurement."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING

import torch

from qlora_cli.data import Data
from qlora_cli.data.batches import eval_batches
from qlora_cli.data.cache import load_or_prepare
from qlora_cli.data.prepare import Prepared, prepare_prompts
from qlora_cli.data.sources import Source
from qlora_cli.errors import TrainingError
from qlora_cli.model.report import refuse_unquantized, report_weights
from qlora_cli.objectives.supervised import TokenLoss, evaluate_loss
from qlora_cli.recipe import Recipe
from qlora_cli.types import Prompt
from qlora_cli.world import World

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

log = logging.getLogger("qlora")


def read_data(
    name: str,
    data: Data,
    sources: list[Source],
    tokenizer: PreTrainedTokenizerFast,
    *,
    use_cache: bool = True,
) -> Prepared:
    """The examples of all sources, with a line about them in the log."""
    prepared, is_old = load_or_prepare(sources, tokenizer, data, use_cache=use_cache)
    log.info("%s data%s: %s", name, " (as prepared before)" if is_old else "", prepared.summary())
    return prepared


def read_prompts(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> list[Prompt]:
    """What `evaluation.tasks` have to answer; none if there is no task.

    Raises:
        DataError: a row has no prompt, or a reference that a task cannot score against.
    """
    settings = recipe.evaluation
    if not settings.tasks:
        return []
    sources = recipe.data.evaluation_sources
    skip = recipe.data.on_bad_row == "skip"
    prompts = [
        prompt for source in sources for prompt in prepare_prompts(source, tokenizer, skip=skip)
    ]
    prompts = prompts[: settings.limit]
    for task in settings.tasks:
        for prompt in prompts:
            task.score(prompt.reference, answer="")
    return prompts


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
