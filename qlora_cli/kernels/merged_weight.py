"""Frozen weights of several linear layers in one tensor, so that one call dequantizes them all.

Queries, keys and values are computed as one matmul, which needs their weights in one matrix. Here
their packed values are in one tensor, and their statistics in another. The weights of the layers
are views of it, so nothing is copied when they are used, and names and values stay.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class MergedWeight:
    """The weights of linear layers with the same input."""

    layers: Sequence[Any]
    values: Tensor
    """(out, in), or its packed 4-bit values (n, 1)."""
    quant_state: Any
    """bitsandbytes' statistics of `values`; None if they are not quantized."""
    addresses: tuple[int, ...]
    """Addresses of the layers' weights, which are views of `values`."""

    @property
    def is_current(self) -> bool:
        """Tell if the layers still have these weights: PEFT replaces them when it merges."""
        return _addresses(self.layers) == self.addresses

    def dequantize(self) -> Tensor:
        """Return the weights (out, in)."""
        if self.quant_state is None:
            return self.values
        import bitsandbytes.functional as bnb

        found: Tensor = bnb.dequantize_4bit(self.values, self.quant_state)
        return found


def merge_weights(layers: Sequence[Any]) -> MergedWeight | None:
    """Move the frozen weights of linear layers into one tensor, and make them views of it.

    Returns:
        None if the weights stay as they are: a single layer, different types, or blocks of
        quantization that do not end where a row ends.
    """
    from bitsandbytes.nn import Linear4bit

    is_quantized = {isinstance(layer, Linear4bit) for layer in layers}
    weights = [layer.weight for layer in layers]
    if len(layers) == 1 or len(is_quantized) > 1 or len({one.dtype for one in weights}) > 1:
        return None
    state = None
    if is_quantized == {True}:
        state = _merge_statistics([weight.quant_state for weight in weights])
        if state is None:
            return None
    elif weights[0].device.type == "cpu":
        return None  # they are mapped from the model's files, and a copy would need memory
    values = torch.cat([weight.data for weight in weights])
    _share(values, weights)
    return MergedWeight(layers, values, state, _addresses(layers))


def _share(whole: Tensor, parts: Sequence[Tensor]) -> None:
    """Make tensors views of the rows of a tensor that has their values."""
    for part, rows in zip(parts, whole.split([len(one) for one in parts]), strict=True):
        part.data = rows


def _addresses(layers: Iterable[Any]) -> tuple[int, ...]:
    return tuple(layer.weight.data_ptr() for layer in layers)


def _merge_statistics(states: Sequence[Any]) -> Any:
    """Return the statistics of weights that are stacked, or None if their blocks do not match.

    Blocks have to end where rows do: bitsandbytes' kernels of a CPU treat other rows one by one.
    """
    from bitsandbytes.functional import QuantState

    first = states[0]
    if len({_format(state) for state in states}) > 1 or first.shape[1] % first.blocksize:
        return None
    if first.nested and not all(
        state.absmax.numel() % state.state2.blocksize == 0
        and torch.equal(state.state2.code, first.state2.code)
        for state in states
    ):
        return None
    absmax = torch.cat([state.absmax for state in states])
    _share(absmax, [state.absmax for state in states])
    offset = state2 = None
    if first.nested:
        # One block of statistics per row, so that each row has the offset of its own weight.
        absmax = absmax.view(-1, first.state2.blocksize)
        offsets = [state.offset.expand(state.state2.absmax.numel()) for state in states]
        offset = torch.cat(offsets)[:, None]
        state2 = QuantState(
            absmax=torch.cat([state.state2.absmax for state in states]),
            code=first.state2.code,
            blocksize=first.state2.blocksize,
            dtype=first.state2.dtype,
        )
    return QuantState(
        absmax=absmax,
        shape=torch.Size([sum(state.shape[0] for state in states), first.shape[1]]),
        code=first.code,
        blocksize=first.blocksize,
        quant_type=first.quant_type,
        dtype=first.dtype,
        offset=offset,
        state2=state2,
    )


def _format(state: Any) -> tuple[Any, ...]:
    """Return what weights of one matrix have in common."""
    inner = state.state2
    statistics = (inner.blocksize, inner.dtype) if state.nested else None
    return state.quant_type, state.blocksize, state.dtype, state.shape[1], statistics
