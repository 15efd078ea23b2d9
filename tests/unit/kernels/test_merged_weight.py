"""Test frozen weights that are views of one tensor."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from torch import nn

from qlora_cli.kernels.lora_linear import Projection, base_weight
from qlora_cli.kernels.merged_weight import merge_weights

OUTS = (256, 512, 256)


def quantized(
    outs: tuple[int, ...] = OUTS,
    width: int = 64,
    quant_type: str = "nf4",
    dtype: torch.dtype = torch.bfloat16,
    **options: Any,
) -> list[Linear4bit]:
    """Make 4-bit layers, each with weights of another mean, so that its offset is its own."""
    layers = []
    for number, out in enumerate(outs):
        torch.manual_seed(number)
        layer = Linear4bit(width, out, bias=False, quant_type=quant_type, **options)
        nn.init.normal_(layer.weight, std=0.1 * (number + 1))
        layers.append(layer.to(dtype).to("cpu"))
    assert all(layer.weight.quant_state is not None for layer in layers)
    return layers


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("compress_statistics", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_merging_changes_no_value(
    quant_type: str, compress_statistics: bool, dtype: torch.dtype
) -> None:
    layers = quantized(quant_type=quant_type, dtype=dtype, compress_statistics=compress_statistics)
    before = [base_weight(layer, dtype) for layer in layers]
    saved = copy.deepcopy([layer.state_dict() for layer in layers])
    merged = merge_weights(layers)
    assert merged is not None
    assert merged.is_current
    assert torch.equal(merged.dequantize(), torch.cat(before))
    for layer, weight, values in zip(layers, before, saved, strict=True):
        assert torch.equal(base_weight(layer, dtype), weight)
        found = layer.state_dict()
        assert found.keys() == values.keys()
        assert all(torch.equal(found[name], values[name]) for name in values)
        assert layer.weight.untyped_storage().data_ptr() == merged.values.data_ptr()  # no copy
        absmax = layer.weight.quant_state.absmax
        assert absmax.untyped_storage().data_ptr() == merged.quant_state.absmax.data_ptr()


def test_merging_16_bit_weights_makes_them_views() -> None:
    """On a device other than a CPU, where weights are not mapped from a file."""
    layers = [nn.Linear(8, out, bias=False, device="meta") for out in OUTS]
    merged = merge_weights(layers)
    assert merged is not None
    assert merged.dequantize().shape == (sum(OUTS), 8)
    storages = {layer.weight.untyped_storage()._cdata for layer in layers}
    assert storages == {merged.values.untyped_storage()._cdata}
    assert [layer.weight.shape[0] for layer in layers] == list(OUTS)
    assert all(isinstance(layer.weight, nn.Parameter) for layer in layers)


UNMERGEABLE: dict[str, Callable[[], list[Any]]] = {
    "one layer": lambda: quantized((256,)),
    "on a CPU": lambda: [nn.Linear(8, out) for out in OUTS],
    "4 and 16 bit": lambda: [*quantized((256,)), nn.Linear(64, 256)],
    "two types": lambda: [*quantized((256,)), *quantized((256,), quant_type="fp4")],
    "two dtypes": lambda: [*quantized((256,)), *quantized((256,), dtype=torch.float32)],
    "one with other statistics": lambda: [
        *quantized((256,)),
        *quantized((256,), compress_statistics=False),
    ],
    "blocks of statistics that end within a weight": lambda: quantized((256, 100)),
    "rows that end within a block": lambda: quantized((512, 512), width=32),
}


@pytest.mark.parametrize("case", list(UNMERGEABLE))
def test_what_cannot_be_merged_stays_as_it_is(case: str) -> None:
    layers = UNMERGEABLE[case]()
    places = [layer.weight.data_ptr() for layer in layers]
    assert merge_weights(layers) is None
    assert [layer.weight.data_ptr() for layer in layers] == places


def test_a_weight_that_was_replaced_is_the_one_that_is_used() -> None:
    """PEFT replaces a 4-bit weight when it merges its update, and again when it unmerges."""
    layers = quantized()
    projection = Projection.merging(layers)
    merged = projection.merged
    assert merged is not None
    [other] = quantized((512,), dtype=torch.bfloat16)
    nn.init.normal_(other.weight.quant_state.state2.absmax)
    layers[1].weight = other.weight
    assert not merged.is_current
    expected = torch.cat([base_weight(layer, torch.bfloat16) for layer in layers])
    assert torch.equal(projection.weight(torch.bfloat16), expected)
    assert not torch.equal(expected, merged.dequantize().to(torch.bfloat16))
