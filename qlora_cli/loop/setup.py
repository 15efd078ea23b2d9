"""Build everything that a training step needs: one line per setting of the recipe."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import torch
from torch import nn

from qlora_cli.data.batching.sampler import BatchStream, eval_batches
from qlora_cli.data.prepared.prepare import PreparedData
from qlora_cli.distributed.world import World, set_seed
from qlora_cli.kernels.device_capabilities import DeviceCapabilities
from qlora_cli.kernels.selection import Kernels, choose_kernels
from qlora_cli.loop.fast_path import (
    ComputeOptions,
    loss_kernel,
    prepare_layers,
    use_padding_free,
    use_shared_prefixes,
)
from qlora_cli.loop.run_data import RecipeData
from qlora_cli.models.heads import initialize_head
from qlora_cli.models.loading import compute_dtype, load_base
from qlora_cli.models.report import TrainedCounts, count_trained_weights, warn_of_untrained
from qlora_cli.models.tokenizer import set_stop_tokens
from qlora_cli.objectives.base import Objective
from qlora_cli.recipe.schema import Recipe
from qlora_cli.recipe.without_effect import settings_without_effect
from qlora_cli.types import Batch, StepHooks

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

log = logging.getLogger("qlora")


class Batches(Protocol):
    """The micro-batches of this rank for any step: a pure function of the step."""

    def micro_batches(self, step: int) -> list[Batch]: ...


BatchesT = TypeVar("BatchesT", bound=Batches)
BatchesT_co = TypeVar("BatchesT_co", bound=Batches, covariant=True)


@dataclass(frozen=True)
class Setup(Generic[BatchesT_co]):
    """Everything that a training step needs; on real tensors, or on the traced ones of a plan."""

    base: PreTrainedModel
    """The base model, with the layers that the adapter added."""
    model: Any
    """The base model in its adapter's wrapper, if the adapter has one."""
    objective: Objective
    shared: nn.Module
    """The objective, wrapped so that its backward pass averages gradients over ranks."""
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    schedule: Callable[[int], float]
    """Factor on the learning rate for a step."""
    step_hooks: StepHooks
    batches: BatchesT_co
    kernels: Kernels
    """The kernels that the layers got, which may be slower than those asked for."""
    world: World
    max_steps: int
    trained: TrainedCounts


def build_setup(
    recipe: Recipe,
    data: RecipeData,
    world: World,
    *,
    init_weights: Callable[[Any], None] | None = None,
    kernels: Kernels | None = None,
) -> Setup[BatchStream]:
    """Load the base model, attach the adapter, and build what trains it.

    Args:
        recipe: its `training.micro_batch_size` must be a number, not `auto`.
        init_weights: loads the weights of an earlier adapter into the model (a warm start).
        kernels: those of a resumed run, which it keeps; None chooses them.

    Raises:
        QloraError: the model, the adapter or the device does not suit the recipe.
    """
    settings = recipe.training
    dtype = compute_dtype(recipe.quantization, settings.precision, world)
    base = load_base(recipe.model, recipe.quantization, dtype, world.device, recipe.objective.head)
    set_stop_tokens(base, data.training.stop_token_ids)
    padding_free = not recipe.adapter.no_packing and use_padding_free(
        base, data.training, data.tokenizer, dtype, world.device, packing=recipe.data.packing
    )
    shares_prefixes = (
        padding_free
        and recipe.objective.rows == "pairs"
        and use_shared_prefixes(base, data.training, data.tokenizer, dtype, world.device)
    )
    batches = stream_batches(
        recipe,
        data.training,
        data.tokenizer,
        padding_free=padding_free,
        shares_prefixes=shares_prefixes,
        rank=world.rank,
        world_size=world.size,
    )
    log.info("one epoch: %s", batches.summary())
    max_steps = settings.max_steps or batches.num_steps

    set_seed(settings.seed)  # the same adapter on every rank
    if recipe.objective.head is not None:
        base.config.pad_token_id = data.tokenizer.pad_token_id
        initialize_head(base)
    model = recipe.adapter.attach(base)
    if init_weights is not None:
        init_weights(model)
    set_seed(settings.seed + world.rank)  # but not the same dropout
    stops = data.training.stops, data.training.stop_token_ids
    warn_of_untrained(base, dict(zip(*stops, strict=True)))
    trained = count_trained_weights(model)
    log.info(trained.summary())
    log.debug(trained.table())

    if not padding_free and settings.kernels != "plain":
        log.info("kernels: plain, because rows are padded")
    options = ComputeOptions(
        dtype,
        kernels
        or choose_kernels(
            # Fused layers pass padded rows to the original layers.
            settings.kernels if padding_free else "plain",
            world.device.type,
            work=trained.total * batches.tokens(max_steps),
        ),
        DeviceCapabilities.of(world.device, dtype),
    )
    return assemble(recipe, base, model, options, batches, world, max_steps)


def warn_of_no_effect(recipe: Recipe, setup: Setup[BatchStream]) -> None:
    """Log a warning for each setting that changes nothing in this run."""
    settings, batches = recipe.training, setup.batches
    found = settings_without_effect(recipe, setup.max_steps)
    if settings.kernels in ("fused", "compiled") and setup.kernels == "plain":
        found.append(
            f"training.kernels ({settings.kernels}) has no effect: no layer of this model and "
            "adapter can be replaced, and the layers of transformers are used"
        )
    if batches.packs_nothing():
        found.append(
            f"data.packing (true) has no effect: no two rows fit into data.max_length "
            f"({recipe.data.max_length:,} tokens) together"
        )
    if (number := batches.rows_per_epoch()) < settings.batch_size:
        found.append(
            f"training.batch_size ({settings.batch_size:,}) is more than the {number:,} rows of an "
            "epoch, so a step sees all rows"
            + (", some of them several times" if settings.passes is None else "")
        )
    for line in found:
        log.warning(line)


def assemble(
    recipe: Recipe,
    base: PreTrainedModel,
    model: nn.Module,
    options: ComputeOptions,
    batches: BatchesT,
    world: World,
    max_steps: int,
) -> Setup[BatchesT]:
    """Install kernels in a model with its adapter, and build its objective and optimizer.

    A run calls this through `build_setup`; a plan calls it on traced tensors.
    """
    kernels = prepare_layers(model, base, recipe.training.gradient_checkpointing, options)
    vocabulary_size = base.config.get_text_config(decoder=True).vocab_size
    cross_entropy = loss_kernel(kernels, world.device, options, vocabulary_size)
    objective = recipe.objective.build(
        model,
        options.dtype,
        cross_entropy,
        options.device.loss_chunks,
        keeps_reference=recipe.reference_mode == "live",
    )
    is_scaled = options.dtype == torch.float16
    return Setup(
        base=base,
        model=model,
        objective=objective,
        shared=objective,
        optimizer=recipe.optimizer.build(model.named_parameters(), world.device),
        scaler=torch.amp.GradScaler(world.device.type, enabled=is_scaled),
        schedule=lambda step: recipe.schedule.scale(step, max_steps),
        step_hooks=recipe.adapter.step_hooks(model, max_steps),
        batches=batches,
        kernels=kernels,
        world=world,
        max_steps=max_steps,
        trained=count_trained_weights(model),
    )


def stream_batches(
    recipe: Recipe,
    training: PreparedData,
    tokenizer: PreTrainedTokenizerFast,
    *,
    padding_free: bool,
    shares_prefixes: bool = False,
    rank: int = 0,
    world_size: int = 1,
) -> BatchStream:
    """Build the stream of training micro-batches of one rank.

    Args:
        padding_free: concatenate the examples of a micro-batch into one row instead of padding
            them.
        shares_prefixes: compute what linked examples have in common once.
    """
    settings, weights = recipe.training, [source.weight for source in recipe.data.train_sources]
    return BatchStream(
        training.examples,
        batch_size=settings.batch_size,
        micro_batch_size=settings.fixed_micro_batch_size,
        seed=settings.seed,
        epochs=settings.passes,
        pad_token_id=tokenizer.pad_token_id,
        parts=list(zip(training.examples.num_by_source(len(weights)), weights, strict=True)),
        max_length=recipe.data.max_length if recipe.data.packing else None,
        padding=not padding_free,
        shares_prefixes=shares_prefixes,
        mismatches=recipe.objective.rows == "feedback",
        rank=rank,
        world_size=world_size,
    )


def evaluation_batches(
    recipe: Recipe,
    evaluation: PreparedData,
    tokenizer: PreTrainedTokenizerFast,
    world: World | None = None,
) -> Iterator[Batch]:
    """Yield the evaluation batches of a process, the one that needs the most memory first.

    Args:
        world: shares the rows; None yields them all.
    """
    return eval_batches(
        evaluation.examples,
        batch_size=recipe.eval_batch_size,
        pad_token_id=tokenizer.pad_token_id,
        mismatches=recipe.objective.rows == "feedback",
        rank=world.rank if world else 0,
        world_size=world.size if world else 1,
    )
