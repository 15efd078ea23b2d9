"""Test LoRA factors that are kept for the micro-batches of a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from qlora_cli.kernels.kept_factors import Factors, factors_of, keep_factors
from qlora_cli.kernels.lora_linear import Projection, unscaled_gradients


class Layer(nn.Module):
    """Two linear layers with the same input."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(8, 6), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(x).sum() + self.up(x).sum()


def adapted() -> Any:
    """Make the layers with two adapters."""
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["gate", "up"], init_lora_weights=False)
    model = get_peft_model(Layer(), config)
    model.add_adapter("other", config)
    return model


def factors(model: Any, dtype: torch.dtype = torch.bfloat16) -> Factors:
    layer = model.base_model.model
    projections = [Projection([layer.gate, layer.up])]
    with torch.no_grad():
        return factors_of(layer, projections, projections[0].trained(), dtype)


def values(found: Factors) -> list[Tensor]:
    return [half for one in found for half in (one.a, one.b) if half is not None]


def test_factors_are_kept_only_within_the_context() -> None:
    model = adapted()
    assert factors(model) is not factors(model)
    with keep_factors():
        first = factors(model)
        assert factors(model) is first
    assert factors(model) is not first
    with keep_factors():
        assert factors(model) is not first


def test_layers_have_their_own_factors() -> None:
    one, other = adapted(), adapted()
    with keep_factors():
        assert factors(one) is not factors(other)
        assert factors(one) is factors(one)


def write(model: Any) -> None:
    with torch.no_grad():
        model.base_model.model.up.lora_B["default"].weight.mul_(2)


def load(model: Any) -> None:
    """Load weights as a checkpoint, a rollback and a warm start do."""
    model.load_state_dict({name: value + 1 for name, value in model.state_dict().items()})


def replace_weight(model: Any) -> None:
    half = model.base_model.model.gate.lora_A["default"]
    half.weight = nn.Parameter(half.weight.detach() + 1)


CHANGES: dict[str, Callable[[Any], None]] = {
    "written": write,
    "loaded": load,
    "replaced": replace_weight,
    "other adapter": lambda model: model.set_adapter("other"),
}


@pytest.mark.parametrize("change", list(CHANGES))
def test_factors_of_other_weights_are_made_again(change: str) -> None:
    model = adapted()
    with keep_factors():
        before = factors(model)
        CHANGES[change](model)
        found = factors(model)
    expected = values(factors(model))
    assert all(torch.equal(*pair) for pair in zip(values(found), expected, strict=True))
    assert not all(torch.equal(*pair) for pair in zip(values(before), expected, strict=True))


def test_factors_of_another_dtype_are_made_again() -> None:
    model = adapted()
    with keep_factors():
        dtypes = [
            {half.dtype for half in values(factors(model, dtype))}
            for dtype in (torch.bfloat16, torch.float32, torch.bfloat16)
        ]
    assert dtypes == [{torch.bfloat16}, {torch.float32}, {torch.bfloat16}]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_gradients_are_scaled_in_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    grads = [torch.randn(3, 4).to(dtype) for _ in range(6)]
    scales = [2.0, 0.3, 1.7]
    expected = [grad.float().clone() for grad in grads]
    for grad, scale in zip(expected[1::2], scales, strict=True):
        grad.mul_(scale)
    found = unscaled_gradients(grads, scales)
    assert [one.dtype for one in found] == [torch.float32] * 6
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert unscaled_gradients([], []) == []
