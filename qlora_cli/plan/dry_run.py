"""The steps of a run for the sake of what they take: with real tensors or with traced ones."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qlora_cli.distributed.world import World
from qlora_cli.kernels.device_capabilities import DeviceCapabilities
from qlora_cli.kernels.selection import Kernels
from qlora_cli.loop.fast_path import loss_kernel, prepare_layers
from qlora_cli.loop.step import clip_gradients, train_step
from qlora_cli.models.packed_attention import attend_by_document
from qlora_cli.objectives.supervised import TokenLoss, evaluate_loss
from qlora_cli.plan.trace.compiled_ops import as_compiled, compiled_loss
from qlora_cli.plan.trace.memory_counter import GRADIENTS, STATES, Count
from qlora_cli.plan.trace.meta_model import hold_model
from qlora_cli.plan.trace.traced_tensor import Blank, TracedTensor
from qlora_cli.recipe.schema import Recipe
from qlora_cli.types import Batch, TrainState

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger("qlora")

FIRST, STEP, EVALUATION = "first step", "step", "evaluation"


class SingleProcess(World):
    """One process on the CPU, without a group or a look at what devices there are."""

    def __init__(self) -> None:
        self.device, self.rank, self.size = torch.device("cpu"), 0, 1


@dataclass(frozen=True)
class Repeated:
    """The same micro-batches in every step."""

    batches: Sequence[Batch]

    def micro_batches(self, step: int) -> list[Batch]:
        """Whatever the step."""
        return list(self.batches)


def dry_run(
    base: PreTrainedModel,
    recipe: Recipe,
    dtype: torch.dtype,
    count: Count,
    *,
    steps: Sequence[Sequence[Batch]],
    held_out: Batch | None,
    means: DeviceCapabilities,
    kernels: Kernels = "fused",
) -> nn.Module:
    """Attach the adapter, make the steps and an evaluation. Returns the model.

    Before the steps there is one of one micro-batch: what it differs in from the others is that the
    optimizer makes its states.

    Args:
        base: as it was loaded.
        dtype: autocast dtype; float32 means no autocast.
        count: counts all of it.
        steps: the micro-batches of each.
        held_out: a batch of the evaluation.
        means: of the device that it is for, as far as they can be traced.
        kernels: that the layers get, as far as they can be had.
    """
    if steps[0][0].documents:
        attend_by_document(base)
    is_traced = _is_traced(base)
    model = _attach(base, recipe, count)
    ops = as_compiled(count) if is_traced else None
    kernels = kernels if steps[0][0].documents else "plain"
    # What there is no CUDA for here says nothing about where it will be.
    with _quietly() if is_traced else nullcontext():
        kernels = prepare_layers(model, base, recipe.training, kernels, dtype, means, ops)
    loss = loss_kernel("fused" if is_traced else kernels, torch.device("cpu"), dtype)
    if is_traced and kernels == "compiled":
        loss = compiled_loss
    objective = TokenLoss(model, dtype, loss)
    optimizer = _build_optimizer(model, recipe)
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)
    world, state = SingleProcess(), TrainState()
    method = recipe.adapter.step_hooks(model, max_steps=1)
    objective.train()
    with _told(count, base, model, optimizer):
        for stage, batches in [(FIRST, steps[0][:1]), *((STEP, step) for step in steps)]:
            gc.collect()  # of what is in cycles, some more would be alive here or not, by chance
            with count.stage(stage):
                train_step(
                    objective,
                    optimizer,
                    1.0,
                    Repeated(batches),
                    recipe.training,
                    world,
                    scaler,
                    state,
                    method,
                )
        if held_out is not None:
            with count.stage(EVALUATION), recipe.optimizer.evaluation_weights(optimizer):
                evaluate_loss(objective, [held_out], world.device)
    return model


def rehearse_update(base: PreTrainedModel, recipe: Recipe, count: Count) -> nn.Module:
    """Attach the adapter, and update it with gradients that nothing computed, in two steps.

    The first makes the optimizer's states. What is held between steps, and what an update takes,
    goes by the shapes of the weights alone: this is the same as in `rehearse`. Returns the model.

    Args:
        base: of traced tensors.
        count: counts all of it.
    """
    model = _attach(base, recipe, count)
    optimizer = _build_optimizer(model, recipe)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    method = recipe.adapter.step_hooks(model, max_steps=1)
    with _told(count, base, model, optimizer):
        for stage in (FIRST, STEP):
            with count.stage(stage):
                for parameter in trained:
                    parameter.grad = torch.empty_like(parameter)
                count.hold((parameter.grad for parameter in trained), GRADIENTS)
                method.before_update()
                clip_gradients(optimizer, recipe.training.max_grad_norm)
                optimizer.step()
                method.after_update(1)
                optimizer.zero_grad(set_to_none=True)
    return model


def _is_traced(model: nn.Module) -> bool:
    return any(isinstance(parameter, TracedTensor) for parameter in model.parameters())


def _attach(base: PreTrainedModel, recipe: Recipe, count: Count) -> nn.Module:
    with Blank() if _is_traced(base) else nullcontext():
        model = recipe.adapter.attach(base)
    gc.collect()  # modules that PEFT replaced are in cycles, and hold weights until then
    hold_model(model, count)
    return model


def _build_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    with _quietly():  # that states are not paged here says nothing about where they will be
        return recipe.optimizer.build(model.named_parameters(), torch.device("cpu"))


@torch.no_grad()
def understands_documents(base: PreTrainedModel) -> bool:
    """Whether a model takes examples that lie end to end, and keeps them apart by our attention."""
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
def _told(
    count: Count, base: PreTrainedModel, model: nn.Module, optimizer: torch.optim.Optimizer
) -> Iterator[None]:
    """Tell the count what gradients and states are, and what is at work."""

    def after(*_: Any) -> None:
        count.updating(False)
        for values in optimizer.state.values():
            count.hold((v for v in values.values() if isinstance(v, torch.Tensor)), STATES)

    hooks = count.step_hooks(base.get_decoder() or base, layers_of(base))
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
    """The layers of the decoder; none if it has no such list."""
    number = base.config.get_text_config(decoder=True).num_hidden_layers
    lists = [m for m in base.modules() if isinstance(m, nn.ModuleList) and len(m) == number]
    return list(lists[0]) if lists else []
