"""The training loop. It reads from top to bottom; what each part does is in the part."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from qlora_cli.loop.monitor import Guard, is_finite
from qlora_cli.recipe.schema import Training
from qlora_cli.loop.trackers import Tracker
from qlora_cli.types import Batch, Follower, TrainState
from qlora_cli.distributed.world import World


class Batches(Protocol):
    """The micro-batches of this rank for any step: a pure function of the step."""

    def micro_batches(self, step: int) -> list[Batch]: ...


_NOTHING = Follower()


def fit(
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: Callable[[int], float],
    batches: Batches,
    settings: Training,
    *,
    max_steps: int,
    world: World,
    scaler: torch.amp.GradScaler,
    state: TrainState,
    guard: Guard,
    method: Follower,
    evaluate: Callable[[], dict[str, float]],
    is_over: Callable[[TrainState], bool],
    save: Callable[[TrainState], None],
    tracker: Tracker,
) -> None:
    """Train until `max_steps`, or until it `is_over` early. One turn is one optimizer step.

    Raises:
        TrainingError: the loss is not finite for some steps in a row, or jumps again and again.
        OutOfMemory: in a step; what was learnt before it is saved.
    """
    # Before the first step; and again where a run that is resumed may have been cut short in it.
    if is_evaluated(settings, state.step) or state.step in (0, max_steps):
        tracker.log(evaluate(), state.step)
    objective.train()
    meter = Meter(state)
    is_saved = True
    while state.step < max_steps and not is_over(state):
        with guard.out_of_memory(state, save):
            metrics = train_step(
                objective,
                optimizer,
                schedule(state.step),
                batches,
                settings,
                world,
                scaler,
                state,
                method,
            )
        state.step += 1
        if guard.goes_back(metrics, state):
            continue
        is_last = state.step == max_steps

        if is_due(settings.log_every, state.step) or is_last or not is_finite(metrics):
            tracker.log(meter.read(metrics, state, world), state.step)
        # While numbers are bad, nothing takes the place of what was saved when they were good.
        is_sound = state.bad_steps == state.high_steps == 0
        is_saved = (is_due(settings.save_every, state.step) and is_sound) or is_last
        if is_saved:
            save(state)  # after the step: state.step steps are done
        if is_evaluated(settings, state.step) or is_last:
            tracker.log(evaluate(), state.step)  # it restores training mode itself
            meter.restart(state)
    if not is_saved:
        save(state)


def train_step(
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    lr_scale: float,
    batches: Batches,
    settings: Training,
    world: World,
    scaler: torch.amp.GradScaler,
    state: TrainState,
    method: Follower = _NOTHING,
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


def is_evaluated(settings: Training, step: int) -> bool:
    """Whether the model is measured after this step."""
    return is_due(settings.eval_every, step) or is_due(settings.tasks_every, step)


def is_due(every: int | None, step: int) -> bool:
    """Whether something done every so many steps is done after this one."""
    return every is not None and step % every == 0


def clip_gradients(optimizer: torch.optim.Optimizer, max_norm: float | None) -> Tensor:
    """Scale the gradients down to a joint norm of `max_norm`; the norm before, as a tensor."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return nn.utils.clip_grad_norm_(parameters, math.inf if max_norm is None else max_norm)


class Meter:
    """Adds to a step's numbers what only the clock and the machine know."""

    def __init__(self, state: TrainState) -> None:
        self.restart(state)

    def restart(self, state: TrainState) -> None:
        """Forget the time that was spent on anything but steps."""
        self._tokens = state.tokens
        self._since = time.monotonic()

    def read(self, metrics: dict[str, float], state: TrainState, world: World) -> dict[str, float]:
        """The metrics of the last step, with speed (since the last reading), memory and tokens."""
        values = dict(metrics)
        seconds = time.monotonic() - self._since
        values["tokens_per_second"] = (state.tokens - self._tokens) / seconds
        values["tokens"] = state.tokens
        values["peak_memory_bytes"] = world.peak_memory_bytes()
        self.restart(state)
        return values
