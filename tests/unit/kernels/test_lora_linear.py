"""Test the projections that several linear layers make together."""

from __future__ import annotations

import torch

from qlora_cli.kernels.lora_linear import Projection


def test_a_layer_without_bias_gets_zeros_on_the_device_of_the_others() -> None:
    linears = [
        torch.nn.Linear(4, 2, bias=False, device="meta"),
        torch.nn.Linear(4, 3, device="meta"),
    ]
    found = Projection(linears).bias(torch.bfloat16)
    assert found is not None
    assert (found.shape, found.device.type, found.dtype) == ((5,), "meta", torch.bfloat16)
