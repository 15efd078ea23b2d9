"""Build the report of a plan from a memory trace."""

from __future__ import annotations

from typing import Any

from qlora_cli.distributed.devices import Target
from qlora_cli.plan.dry_run import EVALUATION, STEP
from qlora_cli.plan.rows import PlanRows
from qlora_cli.plan.stages import peak_of_stages, timeline_of
from qlora_cli.plan.trace.memory_counter import STATES
from qlora_cli.plan.traced_memory import MemoryTrace
from qlora_cli.plan.work import estimate_work
from qlora_cli.recipe.schema import Recipe

MIB = 2**20


def build_report(
    recipe: Recipe, trace: MemoryTrace, target: Target, rows: PlanRows
) -> dict[str, Any]:
    """Build the report of a plan, in bytes, seconds and counts."""
    stages = peak_of_stages(recipe, trace, target, rows)
    name = max(stages, key=lambda stage: stages[stage]["bytes"])
    ranges = [_process_range(entry["bytes"], target) for entry in stages.values()]
    low, high = (max(ends) for ends in zip(*ranges, strict=True))
    trained, trains_base = trace.trained_weights, recipe.adapter.trains_base
    states = trace.peak(EVALUATION, STEP)[1].kinds.get(STATES, 0)
    return {
        "model": {
            "weights": trace.base_weights,
            "trained": trained,
            "trained_share": trained / (trace.base_weights + trained * (not trains_base)),
        },
        "device": {"name": target.name, "number": target.number, "bytes": target.memory_bytes},
        "rows": {
            "from": rows.origin,
            "micro_batches": [[list(one.input_ids.shape) for one in s] for s in rows.steps],
            "steps": rows.num_steps,
            "tokens": rows.tokens,
            "longest": rows.longest,
        },
        "peak": {"stage": name, **stages[name]},
        "stages": stages,
        "timeline": timeline_of(trace, stages),
        "process": {"low": low, "high": high},
        "fits": _verdict(low, high, target),
        "adapter_bytes": 4 * trained * recipe.adapter.saved_per_trained,
        "checkpoint_bytes": 4 * trained + states,
        "quantization": recipe.quantization.model_dump(mode="json"),
        "host": _host(recipe, trace, states, target),
        **estimate_work(recipe, trace, rows, target),
        "traced_layers": list(trace.traced_layers),
        "layers": trace.num_layers,
    }


def _process_range(tensors: int, target: Target) -> tuple[int, int]:
    """Estimate how many bytes a process takes whose tensors take `tensors` bytes, as a range.

    On CUDA it adds a context (141 MiB measured on a T4, more on newer cards), cuBLAS workspaces and
    memory that the allocator cannot use (6 % and up on a T4, by fitcheck-llm 0.2). On a CPU it adds
    Python, the libraries, and memory that malloc keeps.
    """
    if target.kind == "cuda":
        return round(1.02 * tensors) + 200 * MIB, round(1.12 * tensors) + 800 * MIB
    return tensors + 500 * MIB, round(1.05 * tensors) + 1000 * MIB


def _verdict(low: int, high: int, target: Target) -> dict[str, Any]:
    memory = target.memory_bytes
    if memory is None:
        return {"verdict": "unknown", "margin": None}
    verdict = "yes" if high <= memory else "perhaps" if low <= memory else "no"
    return {"verdict": verdict, "margin": memory - high}


def _host(recipe: Recipe, trace: MemoryTrace, states: int, target: Target) -> dict[str, int]:
    """Compute the host memory of a run on a card, in addition to Python and its libraries.

    Inputs of layers are traced; the rest is computed from the optimizer's states.
    """
    if target.kind == "cpu":
        return {}
    paged = states if recipe.optimizer.is_paged else 0
    return {"saving_bytes": states, "paged_bytes": paged, "inputs_bytes": trace.host_bytes}
