"""The largest batches before the first step: memory runs out in the first minute or never."""

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
from qlora_cli.objectives.supervised import TokenLoss, evaluate_loss
from qlora_cli.plan.estimate import PlanRows, estimate
from qlora_cli.plan.shrink_to_fit import resolve_micro_batch_size, with_changes
from qlora_cli.plan.trace.memory_counter import Count
from qlora_cli.plan.trace.meta_model import hold_model
from qlora_cli.recipe.schema import Recipe
from qlora_cli.runs.checkpoint import random_states, set_random_states
from qlora_cli.runs.resume_check import recorded_recipe
from qlora_cli.runs.run_folder import RunFolder
from qlora_cli.types import Batch

log = logging.getLogger("qlora")

_SHARE = 0.05
"""Of a run that the trial may take."""
_WORTH_PLANNING = 50_000_000
"""Weights of a model that a plan is made of; a smaller one fits anywhere."""
_WORTH_FORETELLING = 10
"""Steps of a run that a plan is made of; a shorter one is over when its plan has been read."""


def resolve_auto(recipe: Recipe, world: World, before: RunFolder | None) -> Recipe:
    """The recipe with a number where `training.micro_batch_size` is auto, by what is free here.

    Args:
        before: the run that goes on, which keeps what it had.

    Raises:
        QloraError: in one of its kinds, with its exit code.
    """
    if recipe.training.micro_batch_size != "auto":
        return recipe
    if before is not None:
        size = recorded_recipe(before).training.rows_per_forward
        settled, why = with_changes(recipe, {"training.micro_batch_size": size}), "as it was"
    else:
        config, _ = recipe.model.read_config()
        target = replace(_target(world), number=world.size)
        found = resolve_micro_batch_size(recipe, config, target).training.rows_per_forward
        size = min(world.gather(found))
        settled = with_changes(recipe, {"training.micro_batch_size": size})
        why = f"the largest that fits {target.name} ({size_text(target.memory_bytes or 0)})"
    log.info("training.micro_batch_size: auto is %d, %s", size, why)
    return settled


def preflight(
    recipe: Recipe,
    objective: TokenLoss,
    optimizer: torch.optim.Optimizer,
    batches: BatchStream,
    held_out: Batch | None,
    world: World,
    *,
    max_steps: int,
    num_weights: int,
    kernels: Kernels,
) -> dict[str, int]:
    """Say what the plan of a run is, and try its largest batches, if the run is long enough.

    Args:
        held_out: the largest batch of the evaluation.
        num_weights: of the model.
        kernels: that the model has.

    Returns:
        {"planned_memory_bytes", "tried_memory_bytes" (of tensors), "planned_process_low_bytes",
        "planned_process_high_bytes"}, as far as they are known.

    Raises:
        OutOfMemory: with what to change.
    """
    steps, settings = batches.largest(max_steps), recipe.training
    num_micro_steps = max_steps * -(-settings.batch_size // settings.rows_per_forward)
    rows = PlanRows(steps, held_out, max_steps, batches.tokens(max_steps), "the data")
    is_planned = num_weights >= _WORTH_PLANNING and max_steps >= _WORTH_FORETELLING
    found = foretell(recipe, rows, world, kernels) if is_planned and world.is_main else {}
    if sum(map(len, steps)) > _SHARE * num_micro_steps:
        return found
    is_counted = world.device.type == "cpu" and kernels != "compiled"
    tried = try_largest(objective, optimizer, rows, world, is_counted=is_counted)
    return found if tried is None else {**found, "tried_memory_bytes": tried}


def memory_summary(memory: Mapping[str, int], peak: int, *, is_resident: bool) -> str:
    """What was planned and what was taken, beside each other (`memory` as of `try_first`).

    Args:
        peak: the most that the run took, as it was measured.
        is_resident: whether that is all of the process, or its tensors on a card.
    """

    def beside(*planned: str) -> str:
        sizes = [size_text(memory[name]) for name in planned if name in memory]
        return f" (planned {' to '.join(sizes)})" if sizes else ""

    names = ("planned_process_low_bytes", "planned_process_high_bytes")
    tensors = beside("planned_memory_bytes")
    told = f"the process took {size_text(peak)} at its peak{beside(*names)}"
    if not is_resident:
        told = f"tensors took {size_text(peak)} at their peak{tensors}"
    if "tried_memory_bytes" in memory:
        tried = size_text(memory["tried_memory_bytes"])
        told += f"; the largest batches took {tried} of tensors{tensors * is_resident}"
    return told


def foretell(recipe: Recipe, rows: PlanRows, world: World, kernels: Kernels) -> dict[str, int]:
    """Log what the plan of a run says, and return the bytes of tensors and process at its peak.

    Nothing where the code of the model cannot be traced: what a formula says is logged as such, and
    not set beside what is measured.
    """
    started = time.monotonic()
    try:
        config, _ = recipe.model.read_config()
        recipe = with_changes(recipe, {"training.kernels": kernels})
        report = estimate(recipe, config, _target(world), rows)
    except ModelError as error:
        log.info("no plan: %s", error)
        return {}
    peak, formula = report["peak"], report["formula"]
    how = f"not traced ({formula['why']}), partly by a formula" if formula else "traced"
    log.info(
        "plan: tensors take %s at the peak (%s), the process %s to %s; %s in %.1f s",
        size_text(peak["bytes"]),
        peak["stage"],
        size_text(report["process"]["low"]),
        size_text(report["process"]["high"]),
        how,
        time.monotonic() - started,
    )
    if formula:
        return {}
    process = report["process"]
    return {
        "planned_memory_bytes": peak["bytes"],
        "planned_process_low_bytes": process["low"],
        "planned_process_high_bytes": process["high"],
    }


def try_largest(
    objective: TokenLoss,
    optimizer: torch.optim.Optimizer,
    rows: PlanRows,
    world: World,
    *,
    is_counted: bool,
) -> int | None:
    """Forward, backward and update on the largest batches, and leave everything as it was.

    Args:
        is_counted: count the tensors where no allocator does. Compiled code cannot be: what is met
            for the first time while its operations are watched is never compiled afterwards.

    Returns:
        Bytes of tensors at the peak, as the allocator of the GPU says or as they are counted.

    Raises:
        OutOfMemory: with what to change.
    """
    count = Count()
    shapes = ", ".join("x".join(map(str, b.input_ids.shape)) for step in rows.steps for b in step)
    try:
        with _unchanged(objective, optimizer), count if is_counted else nullcontext():
            hold_model(objective.model, count)
            _take(objective, optimizer, rows, world)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(
            f"out of memory with the largest batches of the run ({shapes} tokens), which were "
            "tried before its first step; nothing was learnt yet",
            hint="qlora plan RECIPE --fit looks for the least harmful changes with which it fits",
        ) from error
    taken = None
    if is_counted:
        taken = max(peak.total for peak in count.peaks.values())
    elif world.device.type != "cpu":
        taken = world.peak_memory_bytes()
    told = "fit" if taken is None else f"take {size_text(taken)} of tensors"
    log.info("the largest batches (%s tokens) %s", shapes, told)
    return taken


def _take(
    objective: TokenLoss, optimizer: torch.optim.Optimizer, rows: PlanRows, world: World
) -> None:
    # States that are there (of a run that goes on) are in memory as they are. Paged ones would be
    # kept by bitsandbytes when they are dropped here.
    makes_states = not optimizer.state and not getattr(optimizer, "is_paged", False)
    # The first makes the states, which are there in all later steps.
    for step in ([rows.steps[0][:1]] if makes_states else []) + rows.steps:
        for batch in step:
            (objective(batch.to(world.device)) / max(1, batch.num_supervised)).backward()
        if makes_states:
            _update(optimizer)
        optimizer.zero_grad(set_to_none=True)
    if rows.held_out is not None:
        evaluate_loss(objective, [rows.held_out], world.device)


def _update(optimizer: torch.optim.Optimizer) -> None:
    """Have the optimizer make its states: without gradient and rate no weight changes."""
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            if parameter.grad is not None:
                parameter.grad.zero_()
    optimizer.step()


@contextmanager
def _unchanged(objective: TokenLoss, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Weights, states, rates and random generators are as before afterwards."""
    generators, was_training = random_states(), objective.training
    # All of them: schedule-free ones count their steps there.
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
    return this_machine() if world.device.type == "cpu" else this_card() or this_machine()
