"""What a recipe takes on a device: its largest batches, traced, and what follows from it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from qlora_cli.data.batching.collate import full_batch
from qlora_cli.distributed.devices import Target
from qlora_cli.distributed.precision import no_bfloat16
from qlora_cli.kernels.selection import Kernels, choose_kernels
from qlora_cli.loop.run_data import RecipeData, read_recipe_data
from qlora_cli.loop.setup import largest_eval_batch, stream_batches
from qlora_cli.plan.analytic_memory import RANGE, SOURCE, by_formula
from qlora_cli.plan.dry_run import EVALUATION, FIRST, STEP, SingleProcess
from qlora_cli.plan.trace.memory_counter import (
    ADAPTER,
    BUCKETS,
    GRADIENTS,
    HELD,
    LOAD,
    LOGITS,
    QUANTIZED,
    STATES,
    UNQUANTIZED,
    Peak,
    Segment,
)
from qlora_cli.plan.trace.meta_model import outline
from qlora_cli.plan.traced_memory import (
    Forecast,
    Untraceable,
    attention_option,
    can_lie_end_to_end,
    forecast,
    in_plain_words,
)
from qlora_cli.recipe.schema import Recipe
from qlora_cli.types import Batch

if TYPE_CHECKING:
    from transformers import PretrainedConfig

MIB = 2**20
PROOF, SAVING = "packing proof", "saving"
_COPY = "copy of optimizer states"


@dataclass(frozen=True)
class PlanRows:
    """What is learnt, as far as memory and time go by it."""

    steps: list[list[Batch]]
    """The micro-batches of those that need the most memory."""
    held_out: Batch | None
    num_steps: int | None
    tokens: int | None
    """Of all steps, padding not counted."""
    origin: str
    """Where this is known from."""


def read_rows(
    recipe: Recipe, *, padding_free: bool, gpus: int = 1, data: RecipeData | None = None
) -> PlanRows:
    """Find the largest batches of the data; full ones if the data is not local.

    Args:
        padding_free: examples share a row without padding.
        data: the recipe's data, where it has been read already.
    """
    if why := missing_locally(recipe):
        return assume_rows(recipe, why, padding_free=padding_free)
    data = data or read_recipe_data(recipe)
    batches = stream_batches(
        recipe, data.training, data.tokenizer, padding_free=padding_free, world_size=gpus
    )
    num_steps = recipe.training.max_steps or batches.num_steps
    held_out = largest_eval_batch(data.evaluation, recipe.eval_batch_size, data.tokenizer)
    tokens = batches.tokens(num_steps)
    return PlanRows(batches.largest(num_steps), held_out, num_steps, tokens, "the data")


def missing_locally(recipe: Recipe) -> str:
    """Say what of a recipe would have to be downloaded to plan with its rows; empty if nothing."""
    if not recipe.model.is_at_hand():
        return "the model's tokenizer is not at hand"
    sources = [*recipe.data.train_sources, *recipe.data.evaluation_sources]
    missing = [source.path for source in sources if not source.is_at_hand()]
    return f"{missing[0]} is not at hand" if missing else ""


def assume_rows(recipe: Recipe, why: str, *, padding_free: bool) -> PlanRows:
    """Rows of `data.max_length` throughout."""
    data, settings = recipe.data, recipe.training
    num_micro_batches = min(2, -(-settings.batch_size // settings.fixed_micro_batch_size))
    full = full_batch(settings.fixed_micro_batch_size, data.max_length, padding_free=padding_free)
    held_out = None
    if data.evaluation_sources:
        held_out = full_batch(recipe.eval_batch_size, data.max_length, padding_free=False)
    steps = settings.max_steps
    tokens = steps and steps * settings.batch_size * data.max_length
    origin = f"rows of data.max_length throughout ({why})"
    return PlanRows([[full] * num_micro_batches], held_out, steps, tokens, origin)


def estimate(
    recipe: Recipe, config: PretrainedConfig, target: Target, rows: PlanRows | None = None
) -> dict[str, Any]:
    """The report about a recipe on a device.

    Args:
        config: of the base model.
        rows: what is learnt, if that is known already.
    """
    if rows is None:
        padding_free = is_padding_free(recipe, config, target)
        rows = read_rows(recipe, padding_free=padding_free, gpus=target.number)
    return describe(recipe, forecast_recipe(recipe, config, target, rows), target, rows)


def is_padding_free(recipe: Recipe, config: PretrainedConfig, target: Target) -> bool:
    """Tell if examples can share a row without padding."""
    if recipe.adapter.no_packing or recipe.data.packing:
        return not recipe.adapter.no_packing
    try:
        return can_lie_end_to_end(recipe, config, compute_dtype(recipe, target))
    except Untraceable:
        return False  # rows with padding take no less


def forecast_recipe(
    recipe: Recipe, config: PretrainedConfig, target: Target, rows: PlanRows
) -> Forecast:
    """Trace the recipe as it would run on a device; by a formula where that cannot be done."""
    found = _foresee_alone(recipe, config, target, rows)
    if target.number == 1:
        return found
    return _exchanging(found, is_whole=all(len(step) == 1 for step in rows.steps))


def _exchanging(found: Forecast, *, is_whole: bool) -> Forecast:
    """One of several devices. From its first step on it holds what gradients are exchanged in,
    which is as large as what is trained.

    As soon as the last micro-batch of a step has a gradient, it is there and nowhere else
    (`World.share`). Until then, those of the micro-batches before it are apart; they are counted so
    to the end of the backward pass, which is a little much.

    Args:
        is_whole: whether each step is one micro-batch.
    """
    exchanged = ("backward", "update") if is_whole else ("update",)
    peaks = {}
    for segment, peak in found.peaks.items():
        kinds = dict(peak.kinds)
        if segment.stage in (FIRST, STEP, EVALUATION):
            kinds[BUCKETS] = kinds[ADAPTER]
        if segment.part in exchanged:
            kinds[GRADIENTS] = 0
        peaks[segment] = Peak(sum(kinds.values()), kinds)
    return replace(found, peaks=peaks)


def _foresee_alone(
    recipe: Recipe, config: PretrainedConfig, target: Target, rows: PlanRows
) -> Forecast:
    dtype = compute_dtype(recipe, target)
    steps, held_out = rows.steps, rows.held_out
    try:
        return forecast(
            recipe, config, dtype, device=target.kind, steps=steps, held_out=held_out,
            kernels=foresee_kernels(recipe, config, target, rows),
        )  # fmt: skip
    except Untraceable as error:
        if recipe.adapter.no_packing:
            raise  # virtual tokens are in no formula
        return by_formula(
            recipe, config, dtype, device=target.kind, steps=steps, held_out=held_out,
            why=error.why,
        )  # fmt: skip


def foresee_kernels(
    recipe: Recipe, config: PretrainedConfig, target: Target, rows: PlanRows
) -> Kernels:
    """What `training.kernels` comes to; where it is not known how long a run is, fused ones, which
    take no less than compiled ones."""
    wanted = recipe.training.kernels
    if wanted != "auto":
        return wanted
    if rows.tokens is None:
        return "fused"
    with in_plain_words(config):
        shape = outline(config, compute_dtype(recipe, target), **attention_option(recipe))
    num_weights = sum(parameter.numel() for parameter in shape.parameters())
    return choose_kernels("auto", target.kind, work=num_weights * rows.tokens)


def compute_dtype(recipe: Recipe, target: Target) -> torch.dtype:
    """What `training.precision` means on a device.

    Raises:
        RecipeError: bf16 was asked for by name and the device computes in none.
    """
    precision = recipe.training.precision
    if precision == "bf16" and not target.has_bfloat16:
        raise no_bfloat16(target.name)
    if precision == "auto" and target.kind == "cuda":
        precision = "bf16" if target.has_bfloat16 else "fp16"
    return recipe.quantization.compute_in(SingleProcess().compute_dtype(precision))


def describe(recipe: Recipe, found: Forecast, target: Target, rows: PlanRows) -> dict[str, Any]:
    """The report, in bytes, seconds and counts."""
    stages = _stages(recipe, found, target, rows)
    name = max(stages, key=lambda stage: stages[stage]["bytes"])
    span = RANGE if found.untraced else (1.0, 1.0)
    process = [_process(entry, target, span) for entry in stages.values()]
    low, high = (max(ends) for ends in zip(*process, strict=True))
    trained = found.trained_weights
    states = found.peak(EVALUATION, STEP)[1].kinds.get(STATES, 0)
    return {
        "model": {
            "weights": found.base_weights,
            "trained": trained,
            "trained_share": trained / (found.base_weights + trained * (not _is_full(recipe))),
        },
        "device": {"name": target.name, "number": target.number, "bytes": target.memory_bytes},
        "rows": {
            "from": rows.origin,
            "micro_batches": [[list(one.input_ids.shape) for one in s] for s in rows.steps],
            "steps": rows.num_steps,
            "tokens": rows.tokens,
        },
        "peak": {"stage": name, **stages[name]},
        "stages": stages,
        "timeline": _timeline(found, stages),
        "process": {"low": low, "high": high},
        "fits": _verdict(low, high, target),
        "adapter_bytes": 4 * trained * recipe.adapter.saved_per_trained,
        "checkpoint_bytes": 4 * trained + states,
        "quantization": recipe.quantization.model_dump(mode="json"),
        "host": _host(recipe, found, states, target),
        **_work(recipe, found, rows, target),
        "formula": _formula(found),
        "traced_layers": list(found.traced_layers),
        "layers": found.num_layers,
    }


def _is_full(recipe: Recipe) -> bool:
    return recipe.adapter.trains_base


def _stages(
    recipe: Recipe, found: Forecast, target: Target, rows: PlanRows
) -> dict[str, dict[str, Any]]:
    """What each stage takes at its peak: bytes, by kind, and where."""
    made = {}
    for stage in (LOAD, FIRST, STEP, EVALUATION):
        if not any(segment.stage == stage for segment in found.peaks):
            continue
        segment, peak = found.peak(stage)
        made[stage] = _entry(segment.part, peak, _untraced(found, segment))
    # The traced first step is of one micro-batch. Until the optimizer has made its states, it holds
    # what later steps hold, but for these.
    _, peak = found.peak(STEP)
    stateless = _without_states(peak)
    if stateless.total > made[FIRST]["bytes"]:
        made[FIRST] = _entry(found.peak(STEP)[0].part, stateless, found.by_formula)
    if rows.steps[0][0].documents:
        made[PROOF] = _entry("forward", _proof(found), (LOGITS,))
    if target.kind == "cpu":
        made[SAVING] = _entry("update", _saving(found), (_COPY,))
    if recipe.optimizer.is_paged and target.kind == "cuda":
        for entry in made.values():
            _set_apart_paged(entry)
    return made


_PARTS = ("forward", "backward", "between", "update")


def _timeline(found: Forecast, stages: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """What is alive from moment to moment, in the order of a run.

    A stage whose peak goes by a formula is one moment.
    """
    timeline = []
    for stage, entry in stages.items():
        segments = sorted((s for s in found.peaks if s.stage == stage), key=_order)
        moments = [
            {**_entry(s.part, found.peaks[s], _untraced(found, s)), **_where(s)} for s in segments
        ]
        if "paged_bytes" in entry:
            for moment in moments:
                _set_apart_paged(moment)
        if max((m["bytes"] for m in moments), default=0) != entry["bytes"]:
            moments = [{**entry, "turn": 1, "place": None}]
        timeline += [{"stage": stage, **moment} for moment in moments]
    return timeline


def _where(segment: Segment) -> dict[str, int | None]:
    return {"turn": segment.turn, "place": segment.place}


def _order(segment: Segment) -> tuple[int, int, float]:
    """Forward from the first layer to the last, and back again; the update comes last."""
    part = _PARTS.index(segment.part)
    last = part == _PARTS.index("update")
    place = float("inf") if segment.place is None else segment.place
    return (segment.turn + last, -1 if last else part, -place if part else place)


def _entry(part: str, peak: Peak, by_formula: Sequence[str] = ()) -> dict[str, Any]:
    """What is alive, and which kinds of it were not traced."""
    kinds = sorted(peak.kinds.items(), key=lambda item: -item[1])
    return {
        "bytes": peak.total,
        "during": part,
        "kinds": {k: v for k, v in kinds if v},
        "by_formula": [k for k, v in kinds if v and k in by_formula],
    }


def _untraced(found: Forecast, segment: Segment) -> Sequence[str]:
    """Kinds of a moment that go by a formula: what a model computes."""
    return () if segment.stage == LOAD or segment.part == "update" else found.by_formula


def _formula(found: Forecast) -> dict[str, Any] | None:
    """Why the code of the model was not traced, and what was done instead."""
    if not found.untraced:
        return None
    return {"why": found.untraced, "source": SOURCE, "range": list(RANGE)}


def _proof(found: Forecast) -> Peak:
    """The proof that packed examples do not see each other, before training; by formula.

    Four times the logits of three examples of 64 tokens, and what comparing them takes.
    """
    _, peak = found.peak(STEP)
    later = (ADAPTER, STATES, BUCKETS)
    kinds = {kind: peak.kinds.get(kind, 0) for kind in HELD if kind not in later}
    kinds[LOGITS] = 4 * (4 * 192 + 4 * 128) * found.vocabulary_size
    return Peak(sum(kinds.values()), kinds)


def _saving(found: Forecast) -> Peak:
    """A checkpoint: what is held between steps, and on the host a copy of the optimizer's states.

    By formula, as writing files is not traced.
    """
    _, peak = found.peak(STEP)
    kinds = {kind: peak.kinds.get(kind, 0) for kind in HELD}
    kinds[_COPY] = kinds[STATES]
    return Peak(sum(kinds.values()), kinds)


def _without_states(peak: Peak) -> Peak:
    kinds = {kind: size for kind, size in peak.kinds.items() if kind != STATES}
    return Peak(sum(kinds.values()), kinds)


def _set_apart_paged(entry: dict[str, Any]) -> None:
    """Paged states can be on the host while something else needs the card."""
    entry["paged_bytes"] = entry["kinds"].pop(STATES, 0)
    entry["bytes"] -= entry["paged_bytes"]


def _process(entry: dict[str, Any], target: Target, span: tuple[float, float]) -> tuple[int, int]:
    """What the process takes in a stage, as a range: tensors, and what is beside them.

    What goes by a formula is somewhere in the `span` of it.

    CUDA: a context (141 MiB were measured on a T4; newer cards take more), workspaces of cuBLAS,
    and what the allocator cannot use (6 % and up on a T4, by fitcheck-llm 0.2). CPU: Python and
    the libraries, and what malloc keeps.
    """
    stated = sum(entry["kinds"][kind] for kind in entry["by_formula"])
    least, most = (entry["bytes"] + round((end - 1) * stated) for end in span)
    if target.kind == "cuda":
        return round(1.02 * least) + 200 * MIB, round(1.12 * most) + 800 * MIB
    return least + 500 * MIB, round(1.05 * most) + 1000 * MIB


def _verdict(low: int, high: int, target: Target) -> dict[str, Any]:
    memory = target.memory_bytes
    if memory is None:
        return {"verdict": "unknown", "margin": None}
    verdict = "yes" if high <= memory else "perhaps" if low <= memory else "no"
    return {"verdict": verdict, "margin": memory - high}


_USED = {"cuda": (0.15, 0.45), "cpu": (0.25, 0.8)}
"""Share of the rate of large products that training reaches, from small models to large ones."""


def _host(recipe: Recipe, found: Forecast, states: int, target: Target) -> dict[str, int]:
    """What a run on a card takes of the host, beside Python and its libraries.

    Inputs of layers are traced, the rest goes by a formula.
    """
    if target.kind == "cpu":
        return {}
    paged = states if recipe.optimizer.is_paged else 0
    return {"saving_bytes": states, "paged_bytes": paged, "inputs_bytes": found.host_bytes}


def _work(recipe: Recipe, found: Forecast, rows: PlanRows, target: Target) -> dict[str, Any]:
    """Floating-point operations of the run, and how long they take, as a range.

    A micro-batch takes no less than reading the weights twice, forward and back.
    """
    num_traced = sum(batch.input_ids.numel() for step in rows.steps for batch in step)
    per_token = found.flops[STEP] / num_traced
    if rows.tokens is None:
        return {"flops_per_token": per_token, "flops": None, "seconds_of_training": None}
    flops = per_token * rows.tokens
    rate = measure_rate() if target.kind == "cpu" else target.teraflops and target.teraflops * 1e12
    if not rate:
        return {"flops_per_token": per_token, "flops": flops, "seconds_of_training": None}
    used = _USED[target.kind]
    slow, fast = (flops / (rate * target.number * share) for share in used)
    if target.bandwidth is not None and rows.num_steps is not None:
        kinds = found.peak(STEP)[1].kinds
        weights = sum(kinds.get(kind, 0) for kind in (QUANTIZED, UNQUANTIZED))
        settings = recipe.training
        turns = (
            rows.num_steps * settings.batch_size / settings.fixed_micro_batch_size / target.number
        )
        reading = 2 * weights * turns / (target.bandwidth * 1e9)
        slow, fast = max(slow, reading), max(fast, reading)
    return {
        "flops_per_token": per_token,
        "flops": flops,
        "seconds_of_training": [fast, slow],
        "rate": {"flops": rate, "used": used, "is_measured": target.kind == "cpu"},
    }


def measure_rate() -> float:
    """Operations a second of a product of some size, on this machine, in what it computes in."""
    dtype = SingleProcess().compute_dtype("auto")
    one = torch.ones(512, 1024, dtype=dtype)
    other = torch.ones(1024, 1024, dtype=dtype)
    one @ other
    started = time.perf_counter()
    for _ in range(8):
        one @ other
    return 8 * 2 * 512 * 1024 * 1024 / (time.perf_counter() - started)
