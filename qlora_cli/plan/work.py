"""Floating-point operations and duration of a run."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from qlora_cli.common.report import ABSENT, Absent
from qlora_cli.distributed.devices import Target
from qlora_cli.plan.dry_run import STEP, SingleProcess
from qlora_cli.plan.report import MatmulRate
from qlora_cli.plan.rows import PlanRows
from qlora_cli.plan.trace.memory_counter import QUANTIZED, UNQUANTIZED
from qlora_cli.plan.traced_memory import MemoryTrace
from qlora_cli.recipe.schema import Recipe

_USED = {"cuda": (0.15, 0.45), "cpu": (0.25, 0.8)}
"""Share of the peak matmul rate that training reaches: small models, large models."""


@dataclass(frozen=True)
class Work:
    """Floating-point operations and duration of a run, as in the report of a plan."""

    flops_per_token: float
    flops: float | None = None
    seconds: tuple[float, float] | None = None
    tokens_per_second: tuple[float, float] | None = None
    rate: MatmulRate | Absent = ABSENT


def estimate_work(recipe: Recipe, trace: MemoryTrace, rows: PlanRows, target: Target) -> Work:
    """Compute the floating-point operations of a run, and ranges for its speed and duration.

    A micro-batch takes at least the time of reading the weights twice, forward and backward.
    """
    num_traced = sum(batch.input_ids.numel() for step in rows.steps for batch in step)
    per_token = trace.flops[STEP] / num_traced
    flops = None if rows.tokens is None else per_token * rows.tokens
    rate = measure_rate() if target.kind == "cpu" else target.teraflops and target.teraflops * 1e12
    if not rate:
        return Work(per_token, flops)
    used = _USED[target.kind]
    slow, fast = (per_token / (rate * target.number * share) for share in used)
    if target.bandwidth is not None:
        kinds = trace.peak(STEP)[1].kinds
        weights = sum(kinds.get(kind, 0) for kind in (QUANTIZED, UNQUANTIZED))
        reading = 2 * weights / (target.bandwidth * 1e9 * target.number)
        reading /= _tokens_per_micro_batch(recipe, rows)
        slow, fast = max(slow, reading), max(fast, reading)
    seconds = None if rows.tokens is None else (fast * rows.tokens, slow * rows.tokens)
    measured = MatmulRate(rate, used, is_measured=target.kind == "cpu")
    return Work(per_token, flops, seconds, (1 / slow, 1 / fast), measured)


def _tokens_per_micro_batch(recipe: Recipe, rows: PlanRows) -> float:
    """Return the mean of a run; of the largest micro-batches if its length is unknown."""
    if rows.tokens is None or rows.num_steps is None:
        batches = [batch for step in rows.steps for batch in step]
        return sum(batch.input_ids.numel() for batch in batches) / len(batches)
    settings = recipe.training
    turns = rows.num_steps * settings.batch_size / settings.fixed_micro_batch_size
    return rows.tokens / turns


def measure_rate() -> float:
    """Measure the matmul rate of this machine in its training dtype (operations per second)."""
    dtype = SingleProcess().compute_dtype("auto")
    one = torch.ones(512, 1024, dtype=dtype)
    other = torch.ones(1024, 1024, dtype=dtype)
    one @ other
    started = time.perf_counter()
    for _ in range(8):
        one @ other
    return 8 * 2 * 512 * 1024 * 1024 / (time.perf_counter() - started)
