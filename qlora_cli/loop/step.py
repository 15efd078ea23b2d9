"""One optimizer step."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from qlora_cli.distributed.world import World
from qlora_cli.kernels.kept_factors import keep_factors
from qlora_cli.loop.monitor import is_finite
from qlora_cli.loop.setup import Batches, Setup
from qlora_cli.recipe.sections import Training
from qlora_cli.types import TrainState


def train_step(setup: Setup[Batches], settings: Training, state: TrainState) -> dict[str, float]:
    """Run forward, backward and update. The loss is the mean over the weight of the whole step.

    Averaging each micro-batch's own mean would over-weight short answers and make the result
    depend on how the batch was cut. Summing and dividing once does not.

    A step whose loss or gradient is not finite is not applied: it would make the weights NaN.

    Returns:
        "loss", "grad_norm", "learning_rate", the weight under the objective's `unit`, and the
        objective's own metrics.
    """
    world, objective, optimizer = setup.world, setup.objective, setup.optimizer
    micro_batches = setup.batches.micro_batches(state.position)
    counts = torch.tensor(
        [[objective.weight(batch), batch.num_tokens] for batch in micro_batches]
    ).sum(0)
    weight, num_tokens = world.sum_on_host(counts)

    micro_batches = objective.prepare(micro_batches, world.device, world.sum)
    loss = torch.zeros((), device=world.device)
    means: dict[str, Tensor] = {}
    with keep_factors():
        for i, micro_batch in enumerate(micro_batches):
            with world.no_sync(setup.shared, last=i == len(micro_batches) - 1):
                micro_loss, sums = setup.shared(micro_batch.to(world.device))
                micro_loss = micro_loss / weight
                # DDP averages over ranks; we want the sum.
                setup.scaler.scale(micro_loss * world.size).backward()
            loss += micro_loss.detach()
            for name, value in sums.items():
                means[name] = means.get(name, 0.0) + value.detach() / weight

    setup.scaler.unscale_(optimizer)
    setup.step_hooks.before_update()
    grad_norm = clip_gradients(optimizer, settings.max_grad_norm)
    metrics = _read_metrics(world, {"loss": loss, **means}, grad_norm)
    scale = setup.schedule(state.step)  # pure function of the step: nothing to resume
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * scale
    if is_finite(metrics):
        setup.scaler.step(optimizer)
        setup.step_hooks.after_update(state.step + 1)
    setup.scaler.update()
    optimizer.zero_grad(set_to_none=True)
    state.tokens += num_tokens
    return {**metrics, "learning_rate": optimizer.param_groups[0]["lr"], objective.unit: weight}


def _read_metrics(world: World, shares: dict[str, Tensor], grad_norm: Tensor) -> dict[str, float]:
    """Add up the loss and the other metrics over ranks, and read them with the gradient's norm.

    The host waits for the device only here: it has to know if the step can be applied.
    """
    totals = world.sum(torch.stack(list(shares.values())))
    *values, norm = torch.cat([totals, grad_norm[None]]).tolist()
    found = dict(zip(shares, values, strict=True))
    return {"loss": found.pop("loss"), "grad_norm": norm, **found}


def clip_gradients(optimizer: torch.optim.Optimizer, max_norm: float | None) -> Tensor:
    """Scale the gradients down to a joint norm of `max_norm`. Returns the norm before."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return nn.utils.clip_grad_norm_(parameters, math.inf if max_norm is None else max_norm)
