"""Checks of gradients: all kernels and memory modes against float32, and against each other."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from qlora_cli.kernels.dropout import SeededDropout
from scripts.gpu.bench import Bench, distance, relative_error
from scripts.gpu.training import Mode, Run, cut, gradients, random_batch


def worst(found: dict[str, Tensor], expected: dict[str, Tensor], by: Any = distance) -> float:
    """Return the largest error of a gradient."""
    return float(max(by(found[name], one) for name, one in expected.items()))


def small_batch(bench: Bench) -> Any:
    """Make a batch of four short rows for the small model."""
    return random_batch((20, 33, 7, 40), 250)


def real_widths(bench: Bench, quantization: str) -> str:
    """Compare gradients at the widths of Llama 3.1 8B (heads of 128) with those in float32.

    Expect fused and compiled layers, with everything kept, half or everything recomputed or
    offloaded, to be at most 1.5 times as far from float32 as transformers' layers are.
    """
    sizes = bench.sizes
    model = bench.large_model(sizes.layers // 2)
    batch = random_batch(cut(sizes.tokens // 4, sizes.documents // 2), sizes.vocabulary)

    def found(**mode: Any) -> dict[str, Tensor]:
        return gradients(bench, Mode(quantization, **mode), batch, model=model)

    exact = found(dtype=torch.float32)
    modes: dict[str, dict[str, Any]] = {
        "plain": {},
        "fused": {"kernels": "fused"},
        "fused, mlp": {"kernels": "fused", "checkpointing": "mlp"},
        "fused, all": {"kernels": "fused", "checkpointing": True},
        "fused, offload": {"kernels": "fused", "checkpointing": "offload"},
    }
    if bench.is_cuda:  # on a CPU, compiling takes longer than all the rest
        modes["compiled, all"] = {"kernels": "compiled", "checkpointing": True}
    errors = {name: worst(found(**mode), exact) for name, mode in modes.items()}
    bench.note("errors", errors)
    figures = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
    plain = errors["plain"]
    assert max(errors.values()) <= max(1.5 * plain, 1e-2), figures
    return figures


def checkpointing_agrees(bench: Bench, kind: str) -> str:
    """Expect finite gradients that are not zero, equal with and without checkpointing."""
    plain = gradients(bench, Mode(kind), small_batch(bench))
    checkpointed = gradients(bench, Mode(kind, checkpointing=True), small_batch(bench))
    for name, gradient in plain.items():
        assert bool(gradient.isfinite().all()), f"{name}: the gradient is not finite"
        assert bool(gradient.any()), f"{name}: the gradient is zero"
    error = worst(checkpointed, plain, relative_error)
    return f"{len(plain)} tensors; {bench.at_most(error, 1e-3, 'relative difference')}"


def fused_agrees(bench: Bench, kind: str) -> str:
    """Compare gradients of fused layers with plain ones, recomputed or not. Expect 5e-2."""
    batch = small_batch(bench)
    plain = gradients(bench, Mode(kind), batch)
    error = max(
        worst(gradients(bench, Mode(kind, "fused", again), batch), plain, relative_error)
        for again in (False, True)
    )
    return f"{len(plain)} tensors; {bench.at_most(error, 5e-2, 'relative difference')}"


def offload_agrees(bench: Bench, kind: str) -> str:
    """Expect offloaded layer inputs to return unchanged."""
    batch, errors = small_batch(bench), []
    for kernels in ("plain", "fused"):
        kept, moved = (
            gradients(bench, Mode(kind, kernels, again), batch) for again in (True, "offload")
        )
        errors.append(worst(moved, kept, relative_error))
    return bench.at_most(max(errors), 1e-3, "relative difference")


def without_flash(bench: Bench) -> str:
    """Compare fp16 gradients with attention by document, as on a T4, with float32.

    Expect 5e-2 at most, finite losses in 12 steps, and no step skipped after the scaler's first.
    """
    batch = small_batch(bench)
    exact = gradients(bench, Mode("nf4", dtype=torch.float32), batch)
    mode = Mode("nf4", "fused", True, torch.float16, by_document=True)
    # The loss is not scaled here, so that small gradients lose digits.
    text = bench.at_most(worst(gradients(bench, mode, batch), exact), 5e-2, "relative error")
    run = Run(bench, mode, [[batch, batch]])
    losses, scales = [], []
    for _ in range(12):
        losses.append(run.step()["loss"])
        scales.append(run.setup.scaler.get_scale())
    skipped = bench.note("skipped_steps", sum(b < a for a, b in itertools.pairwise(scales)))
    assert all(torch.tensor(losses).isfinite()), losses
    assert losses[-1] < losses[0], losses
    assert skipped <= 2, f"{skipped} of 12 steps were skipped"
    return f"{text}; loss {losses[0]:.3f} -> {losses[-1]:.3f}, {skipped} steps skipped"


def dropout_layers(bench: Bench) -> str:
    """Compare gradients of fused layers with dropout, recomputed or not, from one random state.

    Expect the masks to be the same, other ones from another state, and the same share dropped on
    a card as on a CPU: 5 standard deviations at most from the rate.
    """
    batch, found = small_batch(bench), []
    for seed, again in ((3, False), (3, True), (4, True)):
        mode = Mode("nf4", "fused", again, dropout=0.3)
        found.append(gradients(bench, mode, batch, seed=seed))
    kept, recomputed, other = found
    text = bench.at_most(worst(recomputed, kept, relative_error), 1e-3, "relative difference")
    assert worst(other, kept, relative_error) > 1e-2, "another random state drops the same"
    values = torch.ones(1000, 1000, device=bench.device, dtype=torch.bfloat16)
    dropped = SeededDropout(0.3, 7).apply(values)
    share = bench.note("share_dropped", float((dropped == 0).float().mean()))
    assert abs(share - 0.3) < 5 * (0.3 * 0.7 / 1e6) ** 0.5, f"{share} are dropped"
    return f"{text}; {share:.4f} of 0.3 dropped"
