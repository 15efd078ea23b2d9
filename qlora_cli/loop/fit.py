"""The training loop. It reads from top to bottom; what each part does is in the part."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from qlora_cli.distributed.world import World
from qlora_cli.loop.meter import Meter
from qlora_cli.loop.monitor import TrainingMonitor, is_finite
from qlora_cli.loop.step import Batches, train_step
from qlora_cli.loop.trackers import Tracker
from qlora_cli.recipe.schema import Training
from qlora_cli.types import StepHooks, TrainState


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
    monitor: TrainingMonitor,
    method: StepHooks,
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
        with monitor.out_of_memory(state, save):
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
        if monitor.goes_back(metrics, state):
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


def is_evaluated(settings: Training, step: int) -> bool:
    """Whether the model is measured after this step."""
    return is_due(settings.eval_every, step) or is_due(settings.tasks_every, step)


def is_due(every: int | None, step: int) -> bool:
    """Whether something done every so many steps is done after this one."""
    return every is not None and step % every == 0
