"""The training loop. It reads from top to bottom; helpers are in `step.py` and `monitor.py`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from qlora_cli.loop.meter import Meter
from qlora_cli.loop.monitor import TrainingMonitor, is_finite
from qlora_cli.loop.setup import Batches, Setup
from qlora_cli.loop.step import train_step
from qlora_cli.loop.trackers import Tracker
from qlora_cli.recipe.sections import Training
from qlora_cli.types import TrainState


@dataclass(frozen=True)
class Hooks:
    """Callbacks of a run between its steps."""

    evaluate: Callable[[TrainState], dict[str, float]]
    """Returns the metrics of an evaluation; the model is in training mode again afterwards."""
    save: Callable[[TrainState], None]
    """Saves a checkpoint."""
    should_stop: Callable[[TrainState], bool]
    """Called before each step; the run ends early if it returns True."""


def fit(
    setup: Setup[Batches],
    settings: Training,
    state: TrainState,
    hooks: Hooks,
    monitor: TrainingMonitor,
    tracker: Tracker,
) -> None:
    """Train until `max_steps`, or until `should_stop`. One iteration is one optimizer step.

    Raises:
        TrainingError: the loss is not finite for some steps in a row, or jumps again and again.
        OutOfMemory: in a step; a checkpoint of the steps before it has been saved.
    """
    setup, max_steps = replace(setup, shared=setup.world.share(setup.objective)), setup.max_steps
    # A resumed run evaluates again: its interruption may have cut this evaluation short.
    if is_evaluated(settings, state.step) or state.step in (0, max_steps):
        tracker.log(hooks.evaluate(state), state.step)
    setup.shared.train()
    meter = Meter(state)
    is_saved = True
    while state.step < max_steps and not hooks.should_stop(state):
        with monitor.out_of_memory(state, hooks.save):
            metrics = train_step(setup, settings, state)
        state.count(metrics["loss"], is_applied=is_finite(metrics))
        if monitor.rolls_back(metrics, state):
            meter.restart(state)
            continue
        is_last = state.step == max_steps

        if is_due(settings.log_every, state.step) or is_last or not is_finite(metrics):
            tracker.log(meter.read(metrics, state, setup.world), state.step)
        # While losses are bad or high, no checkpoint replaces an earlier, good one.
        is_sound = state.bad_steps == state.high_steps == 0
        is_saved = (is_due(settings.save_every, state.step) and is_sound) or is_last
        if is_saved:
            hooks.save(state)  # `state.step` counts the steps that are done
        if is_evaluated(settings, state.step) or is_last:
            tracker.log(hooks.evaluate(state), state.step)
            meter.restart(state)
    if not is_saved:
        hooks.save(state)


def is_evaluated(settings: Training, step: int) -> bool:
    """Tell if the model is evaluated after this step."""
    return is_due(settings.eval_every, step) or is_due(settings.tasks_every, step)


def is_due(every: int | None, step: int) -> bool:
    """Tell if something done every `every` steps is done after this one."""
    return every is not None and step % every == 0
