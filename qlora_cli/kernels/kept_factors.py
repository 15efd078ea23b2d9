"""Keep the LoRA factors of fused layers for all micro-batches of a step.

Making them takes some ten small operations per linear layer. Their weights do not change within a
step, so the factors of its first micro-batch serve the others. They are dropped before the update.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from qlora_cli.kernels.lora_linear import LoraFactors, Projection

Factors = tuple["LoraFactors", ...]
"""Those of the projections of a layer."""
_Key = tuple[torch.dtype, list[Tensor], list[int]]
"""Compute dtype, weights, and how often each was written to."""

_kept: ContextVar[dict[int, tuple[_Key, Factors]] | None] = ContextVar("_kept", default=None)
"""Factors by layer, while they are kept."""


@contextmanager
def keep_factors() -> Iterator[None]:
    """Keep factors while the context is active. Weights must not change in it."""
    outer = _kept.set({})
    try:
        yield
    finally:
        _kept.reset(outer)


def factors_of(
    layer: object,
    projections: Sequence[Projection],
    trained: Sequence[Tensor],
    dtype: torch.dtype,
) -> Factors:
    """Return the factors of a layer's projections: kept ones, if there are any.

    Kept ones are made again for another dtype, another active adapter, or weights that torch has
    written to.

    Args:
        layer: identifies the layer.
        trained: A and B of all updates (`Projection.trained`).
    """
    kept = _kept.get()
    key = dtype, list(trained), [weight._version for weight in trained]
    if kept is not None:
        found = kept.get(id(layer))
        if found is not None and _are_same(found[0], key):
            return found[1]
    rest, factors = list(trained), []
    for projection in projections:
        number = 2 * len(projection.adapted)
        factors.append(projection.factors(rest[:number], dtype))
        rest = rest[number:]
    made = tuple(factors)
    if kept is not None:
        kept[id(layer)] = key, made
    return made


def _are_same(one: _Key, other: _Key) -> bool:
    return (
        one[0] == other[0]
        and len(one[1]) == len(other[1])
        and all(a is b for a, b in zip(one[1], other[1], strict=True))
        and one[2] == other[2]
    )
