"""Plan a run: trace its steps without weights, and report the memory and time that it needs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cache, partial
from typing import Any

from qlora_cli._compat import quiet_libraries
from qlora_cli.adapters import LoRA
from qlora_cli.common.report import ABSENT
from qlora_cli.distributed.devices import Target, find_target
from qlora_cli.models.context import read_context
from qlora_cli.plan.compatibility import check_model
from qlora_cli.plan.dry_run import EVALUATION, STEP
from qlora_cli.plan.estimate import estimate, largest_rows
from qlora_cli.plan.report import (
    HostMemory,
    LargestRows,
    MicroBatch,
    PlannedDevice,
    PlannedModel,
    PlanReport,
    TableCell,
    TableDevice,
    TableModel,
    TableReport,
)
from qlora_cli.plan.rows import assume_rows, read_available
from qlora_cli.plan.shrink_to_fit import Fitted, resolve_micro_batch_size, shrink_to_fit
from qlora_cli.plan.stages import timeline_of
from qlora_cli.plan.trace.memory_counter import STATES
from qlora_cli.plan.traced_memory import MemoryTrace
from qlora_cli.plan.work import estimate_work
from qlora_cli.recipe.missing_inputs import missing_inputs
from qlora_cli.recipe.schema import Recipe
from qlora_cli.recipe.without_effect import settings_without_effect

METHODS: dict[str, dict[str, Any]] = {
    "full": {"adapter": {"type": "full"}, "quantization": {"type": "none"}},
    "LoRA": {"quantization": {"type": "none"}},
    "8-bit LoRA": {"quantization": {"type": "int8"}},
    "QLoRA": {"quantization": {"type": "nf4"}},
    "bottleneck": {"adapter": {"type": "bottleneck"}, "quantization": {"type": "none"}},
}
LENGTHS = (512, 1024, 2048, 4096)


def plan_table(recipe: Recipe, *, device: str = "cuda") -> TableReport:
    """Compare the memory of training methods for one model, at several row lengths.

    Raises:
        QloraError: a subclass for each kind of error, with its exit code.
    """
    quiet_libraries()
    target = find_target(device)
    config, source = recipe.model.read_config()
    document = recipe.model_dump(mode="json")
    # Learning rates of groups do not change memory, and match nothing in full training.
    document["optimizer"] |= {"groups": [], "lora_plus_ratio": None}
    if recipe.training.micro_batch_size == "auto":
        document["training"]["micro_batch_size"] = 1
    if not isinstance(recipe.adapter, LoRA):
        document["adapter"] = {"type": "lora"}
    methods: dict[str, dict[int, TableCell]] = {}
    for method, sections in METHODS.items():
        for length in LENGTHS:
            data = {**document["data"], "max_length": length}
            one = Recipe.model_validate({**document, **sections, "data": data})
            rows = assume_rows(one, "a table", padding_free=not one.adapter.no_packing)
            found = estimate(one, config, target, rows)
            methods.setdefault(method, {})[length] = TableCell(
                tensors=found.peak.bytes,
                low=found.process.low,
                high=found.process.high,
                verdict=found.fits.verdict,
            )
    return TableReport(
        TableModel(recipe.model.path, source),
        TableDevice(target.name, target.memory_bytes),
        methods,
    )


def plan(recipe: Recipe, *, device: str = "cuda", gpus: int = 1, fit: bool = False) -> PlanReport:
    """Plan a recipe. No weights are read and nothing is trained.

    Args:
        device: cpu, cuda, a memory size or the name of a card.
        gpus: number of devices that train together, each holding the whole model.
        fit: if the recipe does not fit, look for the least harmful changes with which it does. The
            report then describes the changed recipe.

    Raises:
        QloraError: a subclass for each kind of error, with its exit code.
    """
    quiet_libraries()
    started = time.monotonic()
    target = find_target(device, gpus)
    check_model(recipe)
    config, source = recipe.model.read_config()
    # Read once, and only if the plan needs it. The data does not depend on the micro-batch.
    data = cache(partial(read_available, recipe))
    is_auto = recipe.training.micro_batch_size == "auto"
    recipe = resolve_micro_batch_size(recipe, config, target, data)
    if fit:
        fitted = shrink_to_fit(recipe, config, target, data)
    else:
        rows = largest_rows(recipe, config, target, data())
        fitted = Fitted(estimate(recipe, config, target, rows))
    context = read_context(config.to_dict(), recipe.adapter.virtual_tokens)
    return _report(
        fitted,
        target,
        source,
        micro_batch=MicroBatch(recipe.training.fixed_micro_batch_size, is_auto),
        context=context.length if context else None,
        warnings=[
            *(found.problem() for found in missing_inputs(recipe)),
            *settings_without_effect(recipe, fitted.estimate.rows.num_steps),
        ],
        started=started,
    )


def _report(
    fitted: Fitted,
    target: Target,
    source: str,
    *,
    micro_batch: MicroBatch,
    context: int | None,
    warnings: Sequence[str],
    started: float,
) -> PlanReport:
    found = fitted.estimate
    recipe, rows, trace = found.recipe, found.rows, found.trace
    trained, states = trace.trained_weights, _states(trace)
    all_weights = trace.base_weights + trained * (not recipe.adapter.trains_base)
    work = estimate_work(recipe, trace, rows, target)
    return PlanReport(
        model=PlannedModel(
            recipe.model.path, source, trace.base_weights, trained, trained / all_weights
        ),
        device=PlannedDevice(target.name, target.number, target.memory_bytes),
        rows=LargestRows(
            from_=rows.origin,
            micro_batches=[[list(batch.input_ids.shape) for batch in s] for s in rows.steps],
            steps=rows.num_steps,
            tokens=rows.tokens,
            longest=rows.longest,
        ),
        peak=found.peak,
        stages=found.stages,
        timeline=timeline_of(trace, found.stages),
        process=found.process,
        fits=found.fits,
        adapter_bytes=4 * trained * recipe.adapter.saved_per_trained,
        checkpoint_bytes=4 * trained + states,
        quantization=recipe.quantization.model_dump(mode="json"),
        host=_host(recipe, trace, target),
        flops_per_token=work.flops_per_token,
        flops=work.flops,
        seconds_of_training=work.seconds,
        tokens_per_second=work.tokens_per_second,
        rate=work.rate,
        traced_layers=trace.traced_layers,
        layers=trace.num_layers,
        no_shorter=fitted.no_shorter,
        changes=fitted.changes,
        micro_batch=micro_batch,
        context=context,
        warnings=warnings,
        seconds=round(time.monotonic() - started, 1),
    )


def _host(recipe: Recipe, trace: MemoryTrace, target: Target) -> HostMemory:
    """Compute the host memory of a run on a card.

    Inputs of layers are traced; the rest is computed from the optimizer's states.
    """
    if target.kind == "cpu":
        return HostMemory(ABSENT, ABSENT, ABSENT)
    states = _states(trace)
    return HostMemory(states, states if recipe.optimizer.is_paged else 0, trace.host_bytes)


def _states(trace: MemoryTrace) -> int:
    """Return the size of the optimizer's states."""
    return trace.peak(EVALUATION, STEP)[1].kinds.get(STATES, 0)
