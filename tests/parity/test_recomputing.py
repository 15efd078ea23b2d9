"""Test what is saved for the backward pass when layers are not fused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from qlora_cli.adapters import Freeze
from qlora_cli.kernels.decoder_layer import FusedLayer
from qlora_cli.kernels.device_capabilities import DeviceCapabilities
from qlora_cli.loop.fast_path import ComputeOptions, prepare_layers
from tests.parity.tiny_layers import adapted, base, distance, loss_and_gradients


def last_layer_trained(folder: Path) -> tuple[Any, Any]:
    """Make a model whose first layer is fused and whose last is not."""
    inner = base("llama", folder / "base", torch.float32, "none")
    return Freeze(last_layers=1).attach(inner), inner


def one_layer_with_dora(folder: Path) -> tuple[Any, Any]:
    """Make a model with dropout and DoRA in the last layer, which is not fused."""
    inner = base("llama", folder / "base", torch.float32, "none")
    changes = {"layers_to_transform": [1], "target_modules": ["q_proj", "up_proj"]}
    return adapted(inner, ours=True, lora_dropout=0.3, use_dora=True, **changes), inner


def beyond_the_window(folder: Path) -> tuple[Any, Any]:
    """Make a model whose fused layers leave a document of 40 tokens to the original layers."""
    inner = base("mistral-window", folder / "base", torch.float32, "none")
    return adapted(inner, ours=True), inner


@pytest.mark.parametrize("checkpointing", [True, "mlp"])
@pytest.mark.parametrize(
    ("make", "number"),
    [
        (last_layer_trained, 1),
        (one_layer_with_dora, 1),
        (beyond_the_window, 2),
    ],
)
def test_recomputed_activations_are_not_saved(
    tmp_path: Path, make: Any, number: int, checkpointing: Any
) -> None:
    def step(checkpointing: Any) -> tuple[int, Tensor, dict[str, Tensor]]:
        model, inner = make(tmp_path)
        device = DeviceCapabilities.of(torch.device("cpu"), torch.float32)
        prepare_layers(model, inner, checkpointing, ComputeOptions(torch.float32, device=device))
        assert sum(isinstance(one, FusedLayer) for one in inner.modules()) == number
        weights = {one.untyped_storage().data_ptr() for one in model.parameters()}
        kept: dict[int, int] = {}

        def look(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        model.train()
        torch.manual_seed(3)
        with saved_tensors_hooks(look, lambda tensor: tensor):
            loss, gradients = loss_and_gradients(model, torch.float32)
        return sum(kept.values()), loss, gradients

    all_of_it, expected, gradients = step(False)
    found_bytes, found, ours = step(checkpointing)
    assert found_bytes < all_of_it / 2
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert distance(ours, gradients) < 1e-6
