"""Few rows times 4-bit weights. CPUs have another implementation of the same operation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn

from qlora_cli.kernels.four_bit import MAX_ROWS, has_product, multiply
from qlora_cli.kernels.lora_linear import base_weight
from qlora_cli.kernels.peft_lora_layers import multiplies_4_bit, update_first, update_first_in_4_bit
from tests.parity.tiny_layers import adapted, base


def quantized(dtype: torch.dtype, kind: str, *, nested: bool, bias: bool) -> Linear4bit:
    torch.manual_seed(0)
    layer = Linear4bit(
        128, 24, bias=bias, compute_dtype=dtype, quant_type=kind, compress_statistics=nested
    )
    layer.load_state_dict(nn.Linear(128, 24, bias=bias, dtype=dtype).state_dict())
    return layer.to("cpu")  # quantizes it


@pytest.mark.parametrize("rows", [1, 7, 8, MAX_ROWS])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize(("nested", "bias"), [(False, False), (True, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_product_equals_that_of_the_dequantized_weight(
    dtype: torch.dtype, kind: str, rows: int, nested: bool, bias: bool
) -> None:
    layer = quantized(dtype, kind, nested=nested, bias=bias)
    x = torch.randn(rows, 128).to(dtype)
    with torch.no_grad():
        found = multiply(x, layer)
        bias_in_float32 = None if layer.bias is None else layer.bias.float()
        weight = base_weight(layer, torch.float32)
        expected = nn.functional.linear(x.float(), weight, bias_in_float32)
    assert found.dtype == torch.float32
    rounding = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}[dtype]
    assert float((found - expected).norm() / expected.norm()) < rounding


@pytest.fixture(scope="module")
def layer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A LoRA layer on 4-bit weights of whole blocks (64 wide)."""
    folder = tmp_path_factory.mktemp("base") / "base"
    model = adapted(base("llama-wide", folder, torch.bfloat16, "nf4"), ours=True)
    return model.base_model.model.model.layers[0].mlp.up_proj.eval()


def test_small_update_is_kept(layer: Any) -> None:
    """Keep an update of a thousandth of the output, as in training."""
    torch.manual_seed(4)
    x = torch.randn(MAX_ROWS, 64).to(torch.bfloat16)
    weight = layer.lora_B["default"].weight
    kept = weight.detach().clone()

    def output(scale: float) -> Tensor:
        with torch.no_grad():
            weight.copy_(kept * scale)
            found = update_first_in_4_bit(layer, x)
            assert found.dtype == torch.bfloat16
            weight.copy_(kept)
        return found.float()

    change = output(1e-3) - output(0.0)
    low = x.float() @ layer.lora_A["default"].weight.detach().T
    exact = 1e-3 * layer.scaling["default"] * low @ kept.T
    assert float((change * exact).sum() / exact.square().sum()) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("rows", [1, 5, MAX_ROWS])
def test_output_equals_the_dequantized_one_up_to_rounding(layer: Any, rows: int) -> None:
    x = torch.randn(rows, 64).to(torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected, found = update_first(layer, x), update_first_in_4_bit(layer, x)
    assert float((found.float() - expected.float()).norm() / expected.float().norm()) < 1e-2


def test_only_few_rows_without_gradient_on_a_card(layer: Any) -> None:
    with torch.no_grad():
        assert multiplies_4_bit(layer, 1, "cuda")
        assert multiplies_4_bit(layer, MAX_ROWS, "cuda")
        assert not multiplies_4_bit(layer, MAX_ROWS + 1, "cuda")
        assert not multiplies_4_bit(layer, 0, "cuda")
        assert not multiplies_4_bit(layer, 1, "cpu")
        layer.train()
        assert not multiplies_4_bit(layer, 1, "cuda")
        layer.eval()
    assert not multiplies_4_bit(layer, 1, "cuda"), "a gradient may be wanted"


def test_rows_that_are_not_whole_blocks_have_no_product() -> None:
    assert has_product(quantized(torch.float32, "nf4", nested=True, bias=False))
    assert not has_product(Linear4bit(96, 24).to("cpu"))
    assert not has_product(nn.Linear(128, 24))


def test_layer_of_an_unaligned_base_is_dequantized(tmp_path: Path) -> None:
    model = adapted(base("llama", tmp_path / "base", torch.float32, "nf4"), ours=True).eval()
    with torch.no_grad():
        assert not multiplies_4_bit(model.base_model.model.model.layers[0].mlp.up_proj, 1, "cuda")
