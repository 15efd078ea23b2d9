"""Test that offloaded layer inputs give the same losses and gradients, to the last bit."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qlora_cli.kernels.device_capabilities import DeviceCapabilities
from qlora_cli.kernels.offload import PinnedHostMemory, keep_on_host
from qlora_cli.loop.fast_path import ComputeOptions, prepare_layers
from qlora_cli.models.base import start_checkpointing
from tests.parity.tiny_layers import (
    DOCUMENTS,
    adapted,
    base,
    batch,
    distance,
    fused,
    loss_and_gradients,
)


class Watched(PinnedHostMemory):
    """Host memory that records what is put there."""

    def __init__(self) -> None:
        self.shapes: list[torch.Size] = []
        self.taken = 0

    def put(self, tensor: Tensor) -> Tensor:
        self.shapes.append(tensor.shape)
        kept = super().put(tensor)
        assert kept.data_ptr() != tensor.data_ptr()
        return kept

    def get(self, kept: Tensor, device: torch.device) -> Tensor:
        self.taken += 1
        return super().get(kept, device)


def prepared(folder: Path, kernels: str, dtype: torch.dtype, host: PinnedHostMemory | None) -> Any:
    kind = "qwen3" if kernels == "fused" else "llama"
    model = adapted(base(kind, folder / "base", dtype, "nf4"), ours=True)
    if kernels == "fused":
        fused(model, "all")
    else:
        start_checkpointing(model.get_base_model())
    if host is not None:
        inner = model.get_base_model()
        keep_on_host(inner.get_decoder(), inner.get_input_embeddings(), host)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernels", ["fused", "plain"])
def test_offloaded_step_is_bit_identical(tmp_path: Path, kernels: str, dtype: torch.dtype) -> None:
    expected, gradients = loss_and_gradients(prepared(tmp_path, kernels, dtype, None), dtype)
    host = Watched()
    model = prepared(tmp_path, kernels, dtype, host)
    found, ours = loss_and_gradients(model, dtype)
    assert torch.equal(found, expected)
    assert distance(ours, gradients) == 0
    tokens = sum(DOCUMENTS)
    form = {"fused": (tokens, 32), "plain": (1, tokens, 32)}[kernels]
    # Two layers. In float32 what the last norm saves has the form of their inputs too.
    assert host.shapes.count(torch.Size(form)) >= 2
    if dtype == torch.bfloat16:
        assert host.shapes == [form, form]
    assert host.taken >= 2


def test_nothing_is_offloaded_without_gradient_or_after_an_error(tmp_path: Path) -> None:
    host = Watched()
    model = prepared(tmp_path, "fused", torch.bfloat16, host)
    with torch.no_grad():
        model(**batch().inputs())
    with pytest.raises(RuntimeError):  # positions of another number of tokens
        model(**{**batch().inputs(), "position_ids": torch.arange(3)[None]})
    before = len(host.shapes)
    states = torch.randn(sum(DOCUMENTS), 32, dtype=torch.bfloat16, requires_grad=True)
    states.square().sum().backward()
    assert len(host.shapes) == before
    assert states.grad is not None


@pytest.mark.parametrize("kernels", ["fused", "plain"])
def test_offload_without_cuda_acts_as_true_and_warns_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kernels: Any
) -> None:
    def step(checkpointing: Any) -> tuple[Tensor, dict[str, Tensor]]:
        model = adapted(base("llama", tmp_path / "base", torch.float32, "none"), ours=True)
        device = DeviceCapabilities.of(torch.device("cpu"), torch.float32)
        options = ComputeOptions(torch.float32, kernels, device)
        inner = model.get_base_model()
        assert prepare_layers(model, inner, checkpointing, options) == kernels
        return loss_and_gradients(model, torch.float32)

    expected, gradients = step(True)
    with caplog.at_level(logging.WARNING, logger="qlora"):
        found, ours = step("offload")
    warnings = [one.getMessage() for one in caplog.records if one.levelno >= logging.WARNING]
    assert warnings == [
        "training.gradient_checkpointing: offload moves inputs of layers from CUDA memory to the "
        "host; there is no CUDA device here, so it acts as true"
    ]
    assert torch.equal(found, expected)
    assert distance(ours, gradients) == 0
