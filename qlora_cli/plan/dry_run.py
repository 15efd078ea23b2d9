"""Dry-run training steps, on real or on traced tensors, to measure their memory."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qlora_cli.common.decoder import decoder_of
from qlora_cli.distributed.world import World
from qlora_cli.loop.fast_path import CompiledKernels, ComputeOptions
from qlora_cli.loop.setup import assemble
from qlora_cli.loop.step import train_step
from qlora_cli.models.packed_attention import attend_by_document
from qlora_cli.objectives.base import evaluate_objective
from qlora_cli.plan.trace.compiled_ops import as_compiled, compiled_loss
from qlora_cli.plan.trace.memory_counter import GRADIENTS, REFERENCE, STATES, MemoryCounter
from qlora_cli.plan.trace.meta_model import count_model
from qlora_cli.plan.trace.traced_tensor import TracedTensor, TraceNewTensors
from qlora_cli.recipe.schema import Recipe
from qlora_cli.types import Batch, TrainState

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger("qlora")

FIRST, STEP, EVALUATION = "first step", "step", "evaluation"


class SingleProcess(World):
    """One process on the CPU; makes no process group and asks for no device."""

    def __init__(self) -> None:
        self.device, self.rank, self.size = torch.device("cpu"), 0, 1


@dataclass(frozen=True)
class FixedBatches:
    """The same micro-batches in every step."""

    batches: Sequence[Batch]

    def micro_batches(self, step: int) -> list[Batch]:
        """Return them, whatever the step."""
        return list(self.batches)


def dry_run(
    base: PreTrainedModel,
    recipe: Recipe,
    count: MemoryCounter,
    options: ComputeOptions,
    *,
    steps: Sequence[Sequence[Batch]],
    held_out: Batch | None,
) -> nn.Module:
    """Attach the adapter, then run some training steps and an evaluation. Returns the model.

    The steps are those of `qlora train`, on real or on traced tensors. The first stage is a step of
    one micro-batch: it differs from the others in that the optimizer makes its states.

    Args:
        base: the model as it was loaded.
        count: counts all of it.
        options: for traced tensors, the device is the one that the plan is made for.
        steps: the micro-batches of each step.
        held_out: a batch of the evaluation.
    """
    if steps[0][0].documents:
        attend_by_document(base)
    else:
        options = replace(options, kernels="plain")
    is_traced = _is_traced(base)
    model = _attach(base, recipe, count)
    if is_traced:
        options = replace(options, compiled=CompiledKernels(as_compiled(count), compiled_loss))
    with _quietly():  # paging or offloading missing here says nothing about the planned device
        setup = assemble(
            recipe, base, model, options, FixedBatches([]), SingleProcess(), max_steps=1
        )
    if recipe.reference_mode == "precomputed":
        steps = [[_with_reference(batch) for batch in step] for step in steps]
    if (
        held_out is not None
    ):  # the pass of the reference takes no more memory than that of the model
        held_out = _with_reference(held_out)
    count_model(model, count)  # fused layers have merged some of its weights
    count.hold(setup.objective.kept_tensors(), REFERENCE)
    setup.objective.train()
    with _classify(count, base, model, setup.optimizer):
        for stage, batches in [(FIRST, steps[0][:1]), *((STEP, step) for step in steps)]:
            gc.collect()  # otherwise garbage in reference cycles is counted or not, by chance
            with count.stage(stage):
                one = replace(setup, batches=FixedBatches(batches))
                train_step(one, recipe.training, TrainState())
        if held_out is not None:
            with count.stage(EVALUATION), recipe.optimizer.evaluation_weights(setup.optimizer):
                evaluate_objective(setup.objective, [held_out], setup.world.device)
    return model


def _with_reference(batch: Batch) -> Batch:
    """Return a batch with log-probabilities under a reference, as if they had been precomputed."""
    return replace(batch, reference=torch.zeros(batch.num_examples, dtype=torch.float64))


def _is_traced(model: nn.Module) -> bool:
    return any(isinstance(parameter, TracedTensor) for parameter in model.parameters())


def _attach(base: PreTrainedModel, recipe: Recipe, count: MemoryCounter) -> nn.Module:
    with TraceNewTensors() if _is_traced(base) else nullcontext():
        model = recipe.adapter.attach(base)
    gc.collect()  # modules that PEFT replaced are in reference cycles that hold weights
    count_model(model, count)
    return model


def _build_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    with _quietly():  # states not paged here may be paged on the planned device
        return recipe.optimizer.build(model.named_parameters(), torch.device("cpu"))


@torch.no_grad()
def understands_documents(base: PreTrainedModel) -> bool:
    """Check that a model accepts several examples in one row and separates them by attention."""
    if not attend_by_document(base):
        return False
    batch = Batch(torch.ones(1, 8, dtype=torch.long), None, torch.ones(1, 8), (4, 4))
    base.eval()
    try:
        base(**batch.inputs(), use_cache=False)
    except (TypeError, ValueError):
        return False
    return True


@contextmanager
def _quietly() -> Iterator[None]:
    was_disabled, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = was_disabled


@contextmanager
def _classify(
    count: MemoryCounter, base: PreTrainedModel, model: nn.Module, optimizer: torch.optim.Optimizer
) -> Iterator[None]:
    """Report gradients and optimizer states to the count, and which part is running."""

    def after(*_: Any) -> None:
        count.updating(False)
        for values in optimizer.state.values():
            count.hold((v for v in values.values() if isinstance(v, torch.Tensor)), STATES)

    hooks = count.step_hooks(decoder_of(base) or base, layers_of(base))
    hooks += [
        parameter.register_post_accumulate_grad_hook(lambda p: count.hold([p.grad], GRADIENTS))
        for parameter in model.parameters()
        if parameter.requires_grad
    ]
    hooks.append(optimizer.register_step_pre_hook(lambda *_: count.updating(True)))
    hooks.append(optimizer.register_step_post_hook(after))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def layers_of(base: PreTrainedModel) -> list[nn.Module]:
    """Return the layers of the decoder; none if it has no list of them."""
    number = base.config.get_text_config(decoder=True).num_hidden_layers
    lists = [m for m in base.modules() if isinstance(m, nn.ModuleList) and len(m) == number]
    return list(lists[0]) if lists else []
