"""Train a recipe into a run folder. Read this first, then `loop/fit.py`."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_cli._compat import quiet_libraries
from qlora_cli.common.signals import StopSignals
from qlora_cli.data.batching.sampler import BatchStream
from qlora_cli.distributed.precision import PRECISIONS
from qlora_cli.distributed.world import World
from qlora_cli.errors import RecipeError
from qlora_cli.kernels.selection import Kernels
from qlora_cli.loop.fit import Hooks, fit
from qlora_cli.loop.monitor import TrainingMonitor
from qlora_cli.loop.run_data import RunData, prepare_data
from qlora_cli.loop.setup import Batches, Setup, build_setup, warn_of_no_effect
from qlora_cli.loop.trackers import Tracker, open_trackers
from qlora_cli.objectives.preference_settings import PairObjective
from qlora_cli.plan.compatibility import check_model
from qlora_cli.recipe.packages import require_packages
from qlora_cli.recipe.schema import Recipe
from qlora_cli.runs.resume_check import Changes, refuse_changes, refuse_unsafe
from qlora_cli.runs.run_folder import RunFolder
from qlora_cli.train.evaluation import RunEvaluator
from qlora_cli.train.preflight import memory_summary, preflight, resolve_auto
from qlora_cli.train.reference import precompute_reference
from qlora_cli.train.saver import CheckpointManager
from qlora_cli.train.warm_start import WarmStart, find_warm_start
from qlora_cli.types import TrainState

log = logging.getLogger("qlora")


def train(
    recipe: Recipe,
    *,
    resume: str | None = None,
    allow: Sequence[str] = (),
    use_cache: bool = True,
    origins: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Train a recipe, and return the record of the run (run.json in its folder).

    Args:
        resume: continue from a checkpoint in `output.dir`: the newest complete one ("auto"), or
            one by its step or path.
        allow: keys of the recipe whose values may differ from those that the run started with.
        use_cache: keep prepared rows on disk, and reuse those of earlier runs.
        origins: where each value of the recipe comes from, for the record.

    Raises:
        QloraError: one of its subclasses, with its exit code.
        Interrupted: by a signal or `training.stop_after`; a checkpoint has been saved.
    """
    with open_run(recipe, resume, allow) as run:
        if not run.is_resumed:
            # Takes a second, and finds what would fail only after preparation, or in the merge.
            check_model(recipe)
        # Data first: a bad row is found before a large model is loaded.
        data = prepare_data(recipe, use_cache=use_cache)
        is_auto = recipe.training.micro_batch_size == "auto"
        recipe = resolve_auto(recipe, data, run.world, run.folder if run.is_resumed else None)
        # A resumed run has its weights in the checkpoint, even if it began with a warm start. Its
        # reference is the start.
        needs_start = not run.is_resumed or recipe.reference_mode is not None
        warm_start = find_warm_start(recipe, data.base) if needs_start else None
        changes = run.refuse_changes(recipe, data)
        setup = build_setup(
            recipe,
            data,
            run.world,
            init_weights=None if warm_start is None else warm_start.load_into,
            kernels=run.recorded_kernels(),
        )
        warn_of_no_effect(recipe, setup)
        precompute_reference(recipe, setup, data, warm_start, use_cache=use_cache)
        saver = CheckpointManager(run.folder, setup, recipe, data.tokenizer)
        saver.require_disk_space(has_best=data.evaluation is not None)
        state = TrainState() if run.resume is None else saver.resume(run.resume, changes)
        memory = preflight(recipe, setup, data)
        # From here on the folder is a run; what failed before leaves nothing.
        saver.record(
            status="training",
            origins=origins,
            is_micro_batch_auto=is_auto,
            **_facts(recipe, setup, data, run, warm_start),
        )
        monitor = _monitor(setup, data, recipe, saver)
        hooks = _hooks(setup, data, recipe, saver, run)
        saver.start_clock(state)
        with run.stop.after_the_step(), _tracker(run, recipe, setup, state) as tracker:
            if memory:
                saver.note(**memory)
                tracker.log(memory, state.step)
            fit(setup, recipe.training, state, hooks, monitor, tracker)
        return _finish(run, recipe, setup, saver, state, memory)


@dataclass(frozen=True)
class OpenRun:
    """A run whose folder is locked, and that a signal or a deadline can stop."""

    folder: RunFolder
    world: World
    stop: StopSignals
    resume: str | None
    """The checkpoint to continue from; None for a new run."""
    allow: Sequence[str]
    """Keys of the recipe that may differ from the start of the run."""

    @property
    def is_resumed(self) -> bool:
        """The run continues from a checkpoint."""
        return self.resume is not None

    def refuse_changes(self, recipe: Recipe, data: RunData) -> Changes:
        """Return the allowed differences from the start of a resumed run.

        Raises:
            RecipeError: something differs that must not.
        """
        if not self.is_resumed:
            return {}
        return refuse_changes(self.folder, recipe, data.fingerprint, self.allow)

    def recorded_kernels(self) -> Kernels | None:
        """Return the kernels of a resumed run, which it keeps: other kernels round differently."""
        return self.folder.read_record().get("kernels") if self.is_resumed else None

    def is_asked_to_stop(self) -> bool:
        """Tell if a signal or the deadline has reached one of the processes."""
        return self.world.any(self.stop.asked is not None)


@contextmanager
def open_run(recipe: Recipe, resume: str | None, allow: Sequence[str]) -> Iterator[OpenRun]:
    """Make or reopen the run folder, lock it, and handle signals.

    Raises:
        RecipeError: the folder holds another run, or `allow` names keys that cannot be allowed.
        DataError: the recipe's data cannot be trained on.
    """
    quiet_libraries()
    recipe.data.require_rows(recipe.objective)
    require_packages(recipe, for_tasks=recipe.training.tasks_every is not None)
    if allow and resume is None:
        raise RecipeError("--allow has an effect only on a resumed run", hint="add --resume")
    refuse_unsafe(allow)
    world = World(recipe.device)
    log.disabled = not world.is_main
    log.info("device: %s", world.summary())
    folder = RunFolder(Path(recipe.output.dir))
    with (
        folder.started(resume=resume is not None, is_main=world.is_main),
        StopSignals(recipe.training.stop_after_seconds) as stop,
        folder.locked() if world.is_main else nullcontext(),
    ):
        # A late rank must not mistake the folder that its main process made for an earlier run.
        world.wait()
        yield OpenRun(folder, world, stop, resume, allow)


def _facts(
    recipe: Recipe, setup: Setup[Batches], data: RunData, run: OpenRun, warm_start: WarmStart | None
) -> dict[str, Any]:
    """Collect facts about a new run for its record."""
    rows = data.evaluation
    return {
        "max_steps": setup.max_steps,
        "trained_weights": setup.trained.trained,
        "total_weights": setup.trained.total,
        "base": data.base,
        "fingerprint": data.fingerprint,
        "precision": PRECISIONS[setup.objective.dtype],
        "kernels": setup.kernels,
        "optimizer": recipe.optimizer.type_on(run.world.device),
        "data": {"training": data.training.record(), "evaluation": rows and rows.record()},
        "audit": data.audit,
        **({} if warm_start is None else {"parent": warm_start.record()}),
        "tasks": ["loss"] * (rows is not None) + [task.label for task, _ in data.tasks],
    }


def _monitor(
    setup: Setup[BatchStream], data: RunData, recipe: Recipe, saver: CheckpointManager
) -> TrainingMonitor:
    return TrainingMonitor(
        setup,
        recipe.training,
        row_name=data.training.examples.place,
        max_length=recipe.data.max_length,
        is_packed=recipe.data.packing,
        go_back=saver.go_back,
    )


def _hooks(
    setup: Setup[Batches], data: RunData, recipe: Recipe, saver: CheckpointManager, run: OpenRun
) -> Hooks:
    def should_stop(state: TrainState) -> bool:
        return run.is_asked_to_stop() or recipe.is_over(state.step, state.best_step)

    evaluator = RunEvaluator(setup, data, recipe, saver, run.stop)
    return Hooks(evaluator.evaluate, saver.checkpoint, should_stop)


def _tracker(
    run: OpenRun, recipe: Recipe, setup: Setup[Batches], state: TrainState
) -> closing[Tracker]:
    names = recipe.output.trackers if run.world.is_main else None
    folder = run.folder.root
    objective = recipe.objective
    return closing(
        open_trackers(
            names,
            folder,
            max_steps=setup.max_steps,
            first_step=state.step,
            max_fall=objective.max_fall if isinstance(objective, PairObjective) else None,
        )
    )


def _finish(
    run: OpenRun,
    recipe: Recipe,
    setup: Setup[Batches],
    saver: CheckpointManager,
    state: TrainState,
    memory: Mapping[str, int],
) -> dict[str, Any]:
    """Write the last weights, and return the record.

    Args:
        memory: what `preflight` returned.

    Raises:
        Interrupted: the run was asked to stop.
    """
    if run.stop.asked is not None:
        saver.log_interruption(state, run.stop.asked)
        raise run.stop.asked
    if state.step < setup.max_steps:
        log.info(
            "stopped early: no better %s since step %d", recipe.evaluation.best_by, state.best_step
        )
    saver.finish(state)
    record = run.folder.read_record()
    if memory:
        is_resident = run.world.device.type == "cpu"
        log.info(memory_summary(memory, record["peak_memory_bytes"], is_resident=is_resident))
    return record
