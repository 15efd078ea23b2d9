"""Try the largest batches before the first step: memory runs out in the first minute or never."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch

from qlora_cli.common.formatting import size_text
from qlora_cli.data.batching.sampler import BatchStream
from qlora_cli.distributed.devices import Target, this_card, this_machine
from qlora_cli.distributed.world import World, is_out_of_memory
from qlora_cli.errors import ModelError, OutOfMemory
from qlora_cli.kernels.selection import Kernels
from qlora_cli.loop.run_data import RecipeData
from qlora_cli.loop.setup import Batches, Setup, evaluation_batches
from qlora_cli.objectives.base import Objective, evaluate_objective, same
from qlora_cli.plan.estimate import estimate
from qlora_cli.plan.rows import PlanRows
from qlora_cli.plan.shrink_to_fit import resolve_micro_batch_size, with_changes
from qlora_cli.plan.trace.memory_counter import REFERENCE, MemoryCounter
from qlora_cli.plan.trace.meta_model import count_model
from qlora_cli.recipe.schema import Recipe
from qlora_cli.runs.checkpoint import random_states, set_random_states
from qlora_cli.runs.resume_check import recorded_recipe
from qlora_cli.runs.run_folder import RunFolder
from qlora_cli.types import Batch

log = logging.getLogger("qlora")

_MAX_SHARE = 0.05
"""Maximum share of the run that the preflight may use."""
_MIN_WEIGHTS = 50_000_000
"""Smaller models are not planned: they fit anywhere."""
_MIN_STEPS = 10
"""Shorter runs are not planned."""


def resolve_auto(
    recipe: Recipe, data: RecipeData, world: World, resumed: RunFolder | None
) -> Recipe:
    """Replace `training.micro_batch_size: auto` by the number that fits the free memory here.

    Args:
        data: the rows of the recipe; the search forms micro-batches of each size from them.
        resumed: the run that is resumed, which keeps its number; None for a new run.

    Raises:
        QloraError: the model cannot be planned, or the record of the run cannot be read.
    """
    if recipe.training.micro_batch_size != "auto":
        return recipe
    if resumed is not None:
        size = recorded_recipe(resumed).training.fixed_micro_batch_size
        why = "as when the run was started"
    else:
        config, _ = recipe.model.read_config()
        target = replace(_target(world), number=world.size)
        found = resolve_micro_batch_size(recipe, config, target, lambda: data)
        size = min(world.gather(found.training.fixed_micro_batch_size))
        why = f"the largest that fits {target.name} ({size_text(target.memory_bytes or 0)})"
    log.info("training.micro_batch_size: auto is %d, %s", size, why)
    return with_changes(recipe, {"training.micro_batch_size": size})


def preflight(recipe: Recipe, setup: Setup[BatchStream], data: RecipeData) -> dict[str, int]:
    """Log the plan of a run, and try its largest batches, if the run is long enough.

    Returns:
        {"planned_memory_bytes" (tensors at the peak of the run), "planned_step_bytes" (tensors at
        the peak of training steps and evaluation), "tried_memory_bytes" (the same, measured),
        "planned_process_low_bytes", "planned_process_high_bytes"}; unknown ones are absent.

    Raises:
        OutOfMemory: with what to change.
    """
    world, batches, max_steps = setup.world, setup.batches, setup.max_steps
    steps, settings = batches.largest(max_steps), recipe.training
    num_micro_steps = max_steps * -(-settings.batch_size // settings.fixed_micro_batch_size)
    evaluation = None
    if data.evaluation is not None:
        evaluation = next(evaluation_batches(recipe, data.evaluation, data.tokenizer))
    tokens = batches.tokens(max_steps)
    rows = PlanRows(steps, evaluation, max_steps, tokens, "the data", data.longest)
    is_planned = setup.trained.total >= _MIN_WEIGHTS and max_steps >= _MIN_STEPS
    planned = {}
    if is_planned and world.is_main:
        planned = log_plan(recipe, rows, world, setup.kernels)
    if sum(map(len, steps)) > _MAX_SHARE * num_micro_steps:
        return planned
    is_counted = world.device.type == "cpu" and setup.kernels != "compiled"
    tried = try_largest(setup, rows, is_counted=is_counted)
    return planned if tried is None else {**planned, "tried_memory_bytes": tried}


def memory_summary(memory: Mapping[str, int], peak: int, *, is_resident: bool) -> str:
    """Return one line with planned and measured memory.

    Args:
        memory: what `preflight` returned.
        peak: bytes that the run used at most, as measured.
        is_resident: `peak` is the whole process, rather than its tensors on a GPU.
    """

    def planned_text(*planned: str) -> str:
        sizes = [size_text(memory[name]) for name in planned if name in memory]
        return f" (planned {' to '.join(sizes)})" if sizes else ""

    names = ("planned_process_low_bytes", "planned_process_high_bytes")
    tensors = planned_text("planned_memory_bytes")
    text = f"the process took {size_text(peak)} at its peak{planned_text(*names)}"
    if not is_resident:
        text = f"tensors took {size_text(peak)} at their peak{tensors}"
    if "tried_memory_bytes" in memory:
        tried = size_text(memory["tried_memory_bytes"])
        text += f"; the largest batches took {tried} of tensors{planned_text('planned_step_bytes')}"
    return text


def log_plan(recipe: Recipe, rows: PlanRows, world: World, kernels: Kernels) -> dict[str, int]:
    """Log the plan of a run, and return the bytes of tensors and process at its peak.

    Return nothing, and log why, if the code of the model cannot be traced.
    """
    started = time.monotonic()
    try:
        config, _ = recipe.model.read_config()
        recipe = with_changes(recipe, {"training.kernels": kernels})
        found = estimate(recipe, config, _target(world), rows)
    except ModelError as error:
        log.info("no plan: %s", error)
        return {}
    peak, process = found.peak, found.process
    log.info(
        "plan: tensors take %s at the peak (%s), the process %s to %s; traced in %.1f s",
        size_text(peak.bytes),
        peak.stage,
        size_text(process.low),
        size_text(process.high),
        time.monotonic() - started,
    )
    return {
        "planned_memory_bytes": peak.bytes,
        "planned_step_bytes": found.tried_bytes,
        "planned_process_low_bytes": process.low,
        "planned_process_high_bytes": process.high,
    }


def try_largest(setup: Setup[Batches], rows: PlanRows, *, is_counted: bool) -> int | None:
    """Run forward, backward and update on the largest batches, and leave everything as it was.

    Args:
        is_counted: count tensors operation by operation, where no allocator counts them. Not
            possible with compiled kernels: a function first called in this way is never compiled.

    Returns:
        Bytes of tensors at the peak, from the GPU's allocator or from the count.

    Raises:
        OutOfMemory: with what to change.
    """
    count = MemoryCounter()
    shapes = ", ".join("x".join(map(str, b.input_ids.shape)) for step in rows.steps for b in step)
    try:
        with _unchanged(setup), count if is_counted else nullcontext():
            count_model(setup.objective.model, count)
            count.hold(setup.objective.kept_tensors(), REFERENCE)
            _run_batches(setup, rows)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(
            f"out of memory with the largest batches of the run ({shapes} tokens), which were "
            "tried before its first step",
            hint="qlora plan RECIPE --fit finds the least harmful changes that make it fit",
        ) from error
    taken = None
    if is_counted:
        taken = max(peak.total for peak in count.peaks.values())
    elif setup.world.device.type != "cpu":
        taken = setup.world.peak_memory_bytes()
    result = "fit" if taken is None else f"take {size_text(taken)} of tensors"
    log.debug("the largest batches (%s tokens) %s", shapes, result)
    return taken


def _run_batches(setup: Setup[Batches], rows: PlanRows) -> None:
    objective, optimizer, device = setup.objective, setup.optimizer, setup.world.device
    # Existing states (of a resumed run) stay in memory. Paged ones are not made here, because
    # bitsandbytes would keep their memory after they are dropped.
    makes_states = not optimizer.state and not getattr(optimizer, "is_paged", False)
    # The first micro-batch makes the states, which exist in all later steps.
    for step in ([rows.steps[0][:1]] if makes_states else []) + rows.steps:
        for batch in step:
            _mean_loss(objective, batch, device).backward()
        if makes_states:
            _update(optimizer)
        optimizer.zero_grad(set_to_none=True)
    if rows.held_out is not None:
        evaluate_objective(objective, [rows.held_out], device)


def _mean_loss(objective: Objective, batch: Batch, device: torch.device) -> torch.Tensor:
    [prepared] = objective.prepare([batch], device, same)
    loss: torch.Tensor = objective(prepared.to(device))[0]
    return loss / max(1, objective.weight(batch))


def _update(optimizer: torch.optim.Optimizer) -> None:
    """Make the optimizer's states; with zero gradients and rates no weight changes."""
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            if parameter.grad is not None:
                parameter.grad.zero_()
    optimizer.step()


@contextmanager
def _unchanged(setup: Setup[Batches]) -> Iterator[None]:
    """Restore optimizer states, rates and random generators afterwards."""
    objective, optimizer = setup.objective, setup.optimizer
    generators, was_training = random_states(), objective.training
    # All settings of the groups: schedule-free optimizers count their steps there.
    settings = [dict(group) for group in optimizer.param_groups]
    is_new = not optimizer.state
    objective.train()
    try:
        yield
    finally:
        optimizer.zero_grad(set_to_none=True)
        if is_new:
            optimizer.state.clear()
        for group, before in zip(optimizer.param_groups, settings, strict=True):
            group.update(before)
        objective.train(was_training)
        set_random_states(generators)


def _target(world: World) -> Target:
    """Return the device of this run, with the memory that is free on it."""
    return this_card(world.device) or this_machine() if world.is_cuda else this_machine()
