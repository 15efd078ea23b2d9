"""Compiled kernels in a trace: torch.compile makes one pass over memory of each function.

So what a function makes on its way is not in memory, and what it returns is. That is so of what
inductor makes of these functions (torch 2.13, on a CPU), but for columns of one number a row, and
for a float32 copy of the gates in SwiGLU's backward pass. `benchmarks/plan_validation.md` holds it
against the allocator.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from qlora_cli.kernels.elementwise import Elementwise
from qlora_cli.plan.trace.memory_counter import Count


def as_compiled(count: Count) -> Elementwise:
    """Element-wise work as compiled code does it, as far as memory goes."""
    ops = Elementwise.compiled(by=lambda function: partial(count.as_one, function))
    # On a card attention goes backward in the same way, whatever is compiled.
    return ops if count.device == "cpu" else replace(ops, is_compiled=False)


def compiled_loss(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """What `compiled_cross_entropy` takes, which differs from the plain one: it makes no copy."""
    return logits.new_zeros((), dtype=torch.float32), torch.empty_like(logits)
