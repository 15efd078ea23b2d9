"""Estimate the memory of a recipe on a device, by tracing its largest batches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

import torch

from qlora_cli.distributed.devices import Target
from qlora_cli.distributed.precision import no_bfloat16
from qlora_cli.kernels.selection import Kernels, choose_kernels
from qlora_cli.plan.dry_run import EVALUATION, FIRST, STEP, SingleProcess
from qlora_cli.plan.process_memory import BaseFile, process_on_cpu, process_on_cuda
from qlora_cli.plan.report import Fits, PeakMemory, ProcessMemory, StageMemory, Verdict
from qlora_cli.plan.rows import PlanRows, find_rows
from qlora_cli.plan.stages import peak_of_stages
from qlora_cli.plan.trace.memory_counter import ADAPTER, BUCKETS, GRADIENTS, Peak
from qlora_cli.plan.trace.meta_model import build_meta_model
from qlora_cli.plan.traced_memory import (
    MemoryTrace,
    UntraceableModel,
    attention_option,
    refuse_untraceable,
    supports_padding_free,
    trace_memory,
)
from qlora_cli.recipe.schema import Recipe

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from qlora_cli.loop.run_data import RecipeData


@dataclass(frozen=True)
class MemoryEstimate:
    """The memory of a recipe on a device, and whether it fits."""

    recipe: Recipe
    """The recipe, with a number as its micro-batch."""
    rows: PlanRows
    trace: MemoryTrace
    stages: Mapping[str, StageMemory]
    """Stage -> its peak."""
    process: ProcessMemory
    fits: Fits

    @property
    def peak(self) -> PeakMemory:
        """The largest peak."""
        stage = max(self.stages, key=lambda name: self.stages[name].bytes)
        return PeakMemory(**asdict(self.stages[stage]), stage=stage)

    @property
    def tried_bytes(self) -> int:
        """The largest peak of the stages that the preflight tries: training and evaluation."""
        return max(m.bytes for name, m in self.stages.items() if name in (STEP, EVALUATION))


def estimate(
    recipe: Recipe, config: PretrainedConfig, target: Target, rows: PlanRows
) -> MemoryEstimate:
    """Trace a recipe for a device, and estimate the memory of its process.

    Args:
        config: config of the base model.
        rows: the largest batches.

    Raises:
        UntraceableModel: the code of the model cannot be traced without data.
    """
    trace = trace_recipe(recipe, config, target, rows)
    stages = peak_of_stages(recipe, trace, target, rows)
    process = _process(recipe, config, target, trace, stages)
    return MemoryEstimate(recipe, rows, trace, stages, process, _fits(process, target))


def _process(
    recipe: Recipe,
    config: PretrainedConfig,
    target: Target,
    trace: MemoryTrace,
    stages: Mapping[str, StageMemory],
) -> ProcessMemory:
    if target.kind == "cuda":
        return process_on_cuda(max(memory.bytes for memory in stages.values()))
    dtype = compute_dtype(recipe, target)
    # Published weights are in 16 bits, if the config does not say otherwise.
    in_file = config.dtype if isinstance(config.dtype, torch.dtype) else torch.bfloat16
    held = recipe.quantization.load_options(dtype)["dtype"]
    is_kept = held == in_file and not recipe.adapter.trains_base
    return process_on_cpu(
        stages,
        BaseFile(
            trace.base_weights * in_file.itemsize,
            is_kept,
            is_quantized=recipe.quantization.type != "none",
        ),
        trace.kernels,
        is_16_bit=trace.products > 0,
        is_int8=recipe.quantization.type == "int8",
    )


def _fits(process: ProcessMemory, target: Target) -> Fits:
    memory = target.memory_bytes
    if memory is None:
        return Fits("unknown", None)
    low, high = process.needed
    verdict: Verdict = "yes" if high <= memory else "perhaps" if low <= memory else "no"
    return Fits(verdict, memory - high)


def largest_rows(
    recipe: Recipe, config: PretrainedConfig, target: Target, data: RecipeData | None
) -> PlanRows:
    """Find the largest batches of a recipe on a device.

    Args:
        data: the recipe's data; None if it is not available.
    """
    padding_free = is_padding_free(recipe, config, target)
    return find_rows(recipe, data, padding_free=padding_free, gpus=target.number)


def is_padding_free(recipe: Recipe, config: PretrainedConfig, target: Target) -> bool:
    """Return whether examples can share a row without padding."""
    if recipe.adapter.no_packing or recipe.data.packing:
        return not recipe.adapter.no_packing
    try:
        return supports_padding_free(recipe, config, compute_dtype(recipe, target))
    except UntraceableModel:
        return False  # padded rows need at least as much memory


def trace_recipe(
    recipe: Recipe, config: PretrainedConfig, target: Target, rows: PlanRows
) -> MemoryTrace:
    """Trace a recipe as it would run on a device, or on one of several.

    Raises:
        UntraceableModel: the code of the model cannot be traced without data.
    """
    trace = trace_memory(
        recipe,
        config,
        compute_dtype(recipe, target),
        device=target.kind,
        steps=rows.steps,
        held_out=rows.held_out,
        kernels=predict_kernels(recipe, config, target, rows),
    )
    if target.number == 1:
        return trace
    return _add_gradient_buckets(trace, is_whole=all(len(step) == 1 for step in rows.steps))


def _add_gradient_buckets(trace: MemoryTrace, *, is_whole: bool) -> MemoryTrace:
    """Add the buffers in which several devices exchange gradients, as large as what is trained.

    A device holds them from its first step on. Once the last micro-batch of a step has a gradient,
    that gradient exists in its bucket only (`World.share`). Until then, the gradients of earlier
    micro-batches are separate tensors. They are counted as separate until the backward pass ends,
    which slightly overestimates.

    Args:
        is_whole: whether each step is a single micro-batch.
    """
    in_buckets = ("backward", "update") if is_whole else ("update",)
    peaks = {}
    for segment, peak in trace.peaks.items():
        kinds = dict(peak.kinds)
        if segment.stage in (FIRST, STEP, EVALUATION):
            kinds[BUCKETS] = kinds[ADAPTER]
        if segment.part in in_buckets:
            kinds[GRADIENTS] = 0
        peaks[segment] = Peak(sum(kinds.values()), kinds)
    return replace(trace, peaks=peaks)


def predict_kernels(
    recipe: Recipe, config: PretrainedConfig, target: Target, rows: PlanRows
) -> Kernels:
    """Predict which kernels `training.kernels` selects.

    If the length of the run is unknown, these are the fused ones, which need at least as much
    memory as compiled ones.
    """
    wanted = recipe.training.kernels
    if wanted != "auto":
        return wanted
    if rows.tokens is None:
        return "fused"
    with refuse_untraceable(config):
        model = build_meta_model(
            config,
            compute_dtype(recipe, target),
            recipe.objective.head,
            **attention_option(recipe),
        )
    num_weights = sum(parameter.numel() for parameter in model.parameters())
    return choose_kernels("auto", target.kind, work=num_weights * rows.tokens)


def compute_dtype(recipe: Recipe, target: Target) -> torch.dtype:
    """Resolve `training.precision` for a device.

    Raises:
        RecipeError: bf16 is set explicitly and the device does not support it.
    """
    precision = recipe.training.precision
    if precision == "bf16" and not target.has_bfloat16:
        raise no_bfloat16(target.name)
    if precision == "auto" and target.kind == "cuda":
        precision = "bf16" if target.has_bfloat16 else "fp16"
    return recipe.quantization.compute_in(SingleProcess().compute_dtype(precision))
