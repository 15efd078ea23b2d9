"""Trace compiled kernels: torch.compile fuses each function into one pass over memory.

Only what a function returns takes memory then, not its intermediates. Inductor does this with these
functions (torch 2.13, on a CPU), except for one number per row and a float32 copy of the gates in
SwiGLU's backward pass. `benchmarks/plan_validation.md` compares it with the allocator.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from qlora_cli.kernels.elementwise import Elementwise
from qlora_cli.plan.trace.memory_counter import MemoryCounter


def as_compiled(count: MemoryCounter) -> Elementwise:
    """Return element-wise functions that take the memory of compiled ones."""
    ops = Elementwise.compiled(by=lambda function: partial(count.as_one_kernel, function))
    # On a card the backward pass of attention is the same, compiled or not.
    return ops if count.device == "cpu" else replace(ops, is_compiled=False)


def compiled_loss(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Take the memory of `compiled_cross_entropy`, which makes no copy of the logits."""
    return logits.new_zeros(len(targets), dtype=torch.float32), torch.empty_like(logits)
