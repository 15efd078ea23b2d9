"""One optimizer step."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor, nn

from qlora_cli.distributed.world import World
from qlora_cli.loop.monitor import is_finite
from qlora_cli.recipe.schema import Training
from qlora_cli.types import Batch, StepHooks, TrainState


class Batches(Protocol):
    """The micro-batches of this rank for any step: a pure function of the step."""

    def micro_batches(self, step: int) -> list[Batch]: ...


_NOTHING = StepHooks()


def train_step(
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    lr_scale: float,
    batches: Batches,
    settings: Training,
    world: World,
    scaler: torch.amp.GradScaler,
    state: TrainState,
    method: StepHooks = _NOTHING,
) -> dict[str, float]:
    """Forward, backward, update. The loss is the mean over the supervised tokens of the whole step.

    Averaging each micro-batch's own mean would over-weight short answers and make the result
    depend on how the batch was cut; summing and dividing once does not.

    A step whose loss or gradient is not finite is not applied: no weight would survive it.
    """
    micro_batches = batches.micro_batches(state.position)
    counts = torch.tensor(
        [[batch.num_supervised, batch.num_tokens] for batch in micro_batches]
    ).sum(0)
    num_supervised, num_tokens = world.sum_on_host(counts)

    loss = torch.zeros((), device=world.device)
    for i, micro_batch in enumerate(micro_batches):
        with world.no_sync(objective, last=i == len(micro_batches) - 1):
            micro_loss = objective(micro_batch.to(world.device)) / num_supervised
            # DDP averages over ranks; we want the sum.
            scaler.scale(micro_loss * world.size).backward()
        loss += micro_loss.detach()

    scaler.unscale_(optimizer)
    method.before_update()
    grad_norm = clip_gradients(optimizer, settings.max_grad_norm)
    # The only time that the host waits for the device: it has to know whether to go on.
    values = torch.stack([world.sum(loss), grad_norm]).tolist()
    metrics = dict(zip(("loss", "grad_norm"), values, strict=True))
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * lr_scale  # pure function of the step: nothing to resume
    if is_finite(metrics):
        scaler.step(optimizer)
        method.after_update(state.step + 1)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    state.tokens += num_tokens
    return {
        **metrics,
        "learning_rate": optimizer.param_groups[0]["lr"],
        "supervised_tokens": num_supervised,
    }


def clip_gradients(optimizer: torch.optim.Optimizer, max_norm: float | None) -> Tensor:
    """Scale the gradients down to a joint norm of `max_norm`; the norm before, as a tensor."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return nn.utils.clip_grad_norm_(parameters, math.inf if max_norm is None else max_norm)
