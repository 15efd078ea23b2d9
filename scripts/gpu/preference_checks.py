"""Checks of objectives of pairs: the reference, and the prompt that is computed once."""

from __future__ import annotations

import math
import warnings

import torch

from scripts.gpu.bench import Bench
from scripts.gpu.training import Mode, Run, random_pairs

LENGTHS = [(40, 20, 33), (7, 64, 12), (130, 9, 25), (64, 64, 64)]
"""Tokens of the prompt and of both answers of each pair."""


def first_loss(bench: Bench, mode: Mode) -> str:
    """Expect the loss ln 2 in the first step: model and reference are the same weights and layers.

    Also expect one wait of the host in a later step, the one that reads the loss.
    """
    run = Run(bench, mode, [[random_pairs(LENGTHS, 250, seed) for seed in (0, 1)]])
    first = run.step()
    error = bench.note("error", abs(first["loss"] - math.log(2)))
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        if bench.is_cuda:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            later = [run.step()["loss"] for _ in range(3)]
        finally:
            if bench.is_cuda:
                torch.cuda.set_sync_debug_mode("default")
    messages = [str(one.message) for one in found]
    num_waits = bench.note("waits", sum("synchroniz" in message for message in messages))
    figures = f"first loss off by {error:.1e}, then {later[-1]:.4f}; {num_waits} waits in 3 steps"
    assert error <= 1e-6, figures
    assert all(map(math.isfinite, later)), figures
    bench.needs_card()
    assert num_waits == 3, figures
    return figures


def shared_prompts(bench: Bench, mode: Mode) -> str:
    """Compare the gradient's norm and the losses of pairs with the prompt once and twice.

    Expect 2e-2 at most, the rounding of 16 bit.
    """
    found = []
    for shared in (True, False):
        run = Run(bench, mode, [[random_pairs(LENGTHS, 250, shared=shared)]])
        found.append([run.step() for _ in range(2)])
    (_, once), (_, twice) = found
    errors = {
        name: abs(once[name] - twice[name]) / max(abs(twice[name]), 1e-3)
        for name in ("loss", "grad_norm", "logp_chosen", "logp_rejected")
    }
    bench.note("errors", errors)
    figures = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
    assert max(errors.values()) <= 2e-2, figures
    return figures
