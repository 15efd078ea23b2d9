"""Training, from a recipe to a run folder. Read this first, then `loop.py`."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import torch

from qlora_cli._compat import quiet_libraries
from qlora_cli.common.signals import StopSignals
from qlora_cli.data.prepared.audit import check_data
from qlora_cli.data.prepared.cache import read_data
from qlora_cli.data.render.chat_template import read_chat_template
from qlora_cli.distributed.precision import PRECISIONS
from qlora_cli.distributed.world import World, set_seed
from qlora_cli.errors import Interrupted, RecipeError
from qlora_cli.evaluate.scorer import ModelScorer, ask
from qlora_cli.kernels.device_capabilities import DeviceCapabilities
from qlora_cli.kernels.selection import choose_kernels
from qlora_cli.loop.fast_path import loss_kernel, prepare_layers, use_padding_free
from qlora_cli.loop.fit import fit, is_due
from qlora_cli.loop.monitor import TrainingMonitor
from qlora_cli.loop.setup import largest_eval_batch, stream_batches
from qlora_cli.loop.trackers import open_trackers
from qlora_cli.models.base import set_stop_tokens
from qlora_cli.models.identity import identify
from qlora_cli.models.loading import compute_dtype, load_base
from qlora_cli.models.report import report_trained, warn_of_untrained
from qlora_cli.objectives.supervised import TokenLoss
from qlora_cli.recipe.schema import Recipe
from qlora_cli.runs.resume_check import refuse_changes, refuse_unsafe, take_fingerprint
from qlora_cli.runs.run_folder import RunFolder
from qlora_cli.tasks.task import read_tasks
from qlora_cli.train.disk_space import count_saves
from qlora_cli.train.evaluation import measure
from qlora_cli.train.preflight import memory_summary, preflight, resolve_auto
from qlora_cli.train.saver import CheckpointManager
from qlora_cli.train.warm_start import find_warm_start
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
    """Run a recipe. The returned record is also in the run folder, as run.json.

    Args:
        resume: go on from a checkpoint in `output.dir`: "auto" is the newest that is whole, or its
            step, or its path.
        allow: keys of the recipe that may have another value than when the run was started.
        use_cache: keep the prepared data, and take what was kept before.
        origins: where each value of the recipe comes from, for the record.

    Raises:
        QloraError: in one of its kinds, with its exit code.
        Interrupted: by a signal or `training.stop_after`; what was learnt is saved.
    """
    quiet_libraries()
    recipe.data.refuse_untrainable()
    if allow and resume is None:
        raise RecipeError("--allow is for a run that goes on", hint="give --resume too")
    refuse_unsafe(allow)
    world = World()
    log.disabled = not world.is_main
    run = RunFolder(Path(recipe.output.dir))
    run.start(resume=resume is not None)
    with (
        StopSignals(recipe.training.stop_after_seconds) as stop,
        run.locked() if world.is_main else nullcontext(),
    ):
        world.wait()  # a rank that is late must not find the run of its own main process
        return _train(recipe, run, world, stop, resume, allow, use_cache=use_cache, origins=origins)


def _train(
    recipe: Recipe,
    run: RunFolder,
    world: World,
    stop: StopSignals,
    resume: str | None,
    allow: Sequence[str],
    *,
    use_cache: bool,
    origins: Mapping[str, str] | None,
) -> dict[str, Any]:
    is_auto = recipe.training.micro_batch_size == "auto"
    recipe = resolve_auto(recipe, world, None if resume is None else run)
    settings = recipe.training

    # Data first: a bad row is found before a large model is loaded.
    tokenizer = recipe.model.load_tokenizer(read_chat_template(recipe.data.chat_template))
    learnt = read_data(
        "training", recipe.data, recipe.data.train_sources, tokenizer, use_cache=use_cache
    )
    held_out = None
    if sources := recipe.data.evaluation_sources:
        held_out = read_data("evaluation", recipe.data, sources, tokenizer, use_cache=use_cache)
    # Before a large model is loaded: rows that cannot be asked about are found here too.
    exam = read_tasks(
        recipe.evaluation.tasks, recipe.data, tokenizer, limit=recipe.evaluation.limit
    )
    audit = check_data(recipe.data, learnt, held_out, tokenizer)
    identity = identify(recipe.model.locate())
    fingerprint = take_fingerprint(identity, tokenizer, learnt, held_out)
    # What goes on has its weights in the checkpoint, wherever they once came from.
    parent = find_warm_start(recipe, identity) if resume is None else None
    changes = {} if resume is None else refuse_changes(run, recipe, fingerprint, allow)
    dtype = compute_dtype(recipe.quantization, settings.precision, world)
    base = load_base(recipe.model, recipe.quantization, dtype, world.device)
    set_stop_tokens(base, learnt.stop_token_ids)
    padding_free = not recipe.adapter.no_packing and use_padding_free(
        base, learnt, tokenizer, dtype, world.device, packing=recipe.data.packing
    )
    batches = stream_batches(
        recipe, learnt, tokenizer, padding_free=padding_free, rank=world.rank, world_size=world.size
    )
    log.info("a pass over them: %s", batches.summary())
    max_steps = settings.max_steps or batches.num_steps

    set_seed(settings.seed)  # the same adapter on every rank
    model = recipe.adapter.attach(base)
    if parent is not None:
        parent.load_into(model)
    set_seed(settings.seed + world.rank)  # but not the same dropout
    warn_of_untrained(base, dict(zip(learnt.stops, learnt.stop_token_ids, strict=True)))
    trained = report_trained(model)
    log.info(trained.summary())
    # A run that goes on keeps its kernels: others round otherwise.
    kernels = (run.read_record() if resume else {}).get("kernels") or choose_kernels(
        # Fused layers leave padded rows to the layers that they replace.
        settings.kernels if padding_free else "plain",
        world.device.type,
        work=trained.total * batches.tokens(max_steps),
    )
    means = DeviceCapabilities.of(world.device, dtype)
    kernels = prepare_layers(model, base, settings, kernels, dtype, means)

    def write_weights(folder: Path) -> None:
        with recipe.optimizer.evaluation_weights(optimizer):
            recipe.adapter.save(model, folder)
        tokenizer.save_pretrained(folder)
        base.generation_config.save_pretrained(folder)

    objective = TokenLoss(model, dtype, loss_kernel(kernels, world.device, dtype))
    optimizer = recipe.optimizer.build(model.named_parameters(), world.device)
    scaler = torch.amp.GradScaler(world.device.type, enabled=dtype == torch.float16)
    saver = CheckpointManager(
        run,
        world,
        model,
        optimizer,
        scaler,
        keep_checkpoints=recipe.output.keep_checkpoints,
        write_weights=write_weights,
        best_by=recipe.evaluation.best_by,
        lower_is_better=bool(recipe.measures[recipe.evaluation.best_by].lower_is_better),
    )
    saver.require_disk_space(
        num_trained=trained.trained,
        state_bytes=recipe.optimizer.state_bytes,
        saves=count_saves(max_steps, settings.save_every),
        has_best=held_out is not None,
    )
    state = TrainState()
    if resume is not None:
        state = saver.resume(resume, max_steps, settings.seed, changes)
    saver.record(
        recipe,
        status="training",
        origins=origins,
        max_steps=max_steps,
        trained_weights=trained.trained,
        total_weights=trained.total,
        base=identity,
        fingerprint=fingerprint,
        precision=PRECISIONS[dtype],
        kernels=kernels,
        is_micro_batch_auto=is_auto,
        data={"training": learnt.record(), "evaluation": held_out and held_out.record()},
        audit=audit,
        **({} if parent is None else {"parent": parent.record()}),
        tasks=["loss"] * (held_out is not None) + [task.label for task, _ in exam],
    )

    monitor = TrainingMonitor(
        settings,
        objective=objective,
        optimizer=optimizer,
        scaler=scaler,
        batches=batches,
        world=world,
        place=learnt.examples.place,
        max_length=recipe.data.max_length,
        is_packed=recipe.data.packing,
        go_back=saver.go_back,
    )

    memory = preflight(
        recipe,
        objective,
        optimizer,
        batches,
        largest_eval_batch(held_out, recipe.eval_batch_size, tokenizer),
        world,
        max_steps=max_steps,
        num_weights=trained.total,
        kernels=kernels,
    )

    def evaluate() -> dict[str, float]:
        metrics = {}
        if held_out is not None:
            metrics = measure(objective, held_out, tokenizer, recipe.eval_batch_size, world)
        is_last = state.step == max_steps and settings.tasks_every is not None
        if is_due(settings.tasks_every, state.step) or is_last:
            scorer = ModelScorer("tasks", model, recipe, tokenizer, dtype, world)
            metrics |= {f"eval_{k}": v for k, v in ask(exam, scorer, world).items()}
        return metrics

    def evaluate_and_keep_best() -> dict[str, float]:
        with saver.rescuing(state):
            try:
                # Several processes cannot leave it in different places.
                at_once = stop.at_once() if world.size == 1 else nullcontext()
                with recipe.optimizer.evaluation_weights(optimizer), at_once:
                    metrics = evaluate()
            except Interrupted:
                return {}  # a run that is resumed evaluates here again
            saver.keep_best(metrics, state)
            return metrics

    started = time.monotonic()
    names = recipe.output.trackers if world.is_main else None
    with (
        stop.after_the_step(),
        closing(
            open_trackers(names, run.root, max_steps=max_steps, first_step=state.step)
        ) as tracker,
    ):
        if memory:
            saver.note(**memory)
            tracker.log(memory, state.step)
        fit(
            world.share(objective),
            optimizer,
            lambda step: recipe.schedule.scale(step, max_steps),
            batches,
            settings,
            max_steps=max_steps,
            world=world,
            scaler=scaler,
            state=state,
            monitor=monitor,
            method=recipe.adapter.step_hooks(model, max_steps),
            evaluate=evaluate_and_keep_best,
            is_over=lambda state: (
                world.any(stop.asked is not None) or recipe.is_over(state.step, state.best_step)
            ),
            save=saver.checkpoint,
            tracker=tracker,
        )
    if stop.asked is not None:
        saver.interrupted(state, stop.asked)
        raise stop.asked
    if state.step < max_steps:
        log.info(
            "stopped early: no better %s since step %d", recipe.evaluation.best_by, state.best_step
        )
    saver.finish(state, seconds=time.monotonic() - started)
    record = run.read_record()
    if memory:
        is_resident = world.device.type == "cpu"
        log.info(memory_summary(memory, record["peak_memory_bytes"], is_resident=is_resident))
    return record
