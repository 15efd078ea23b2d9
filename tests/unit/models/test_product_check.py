"""Products with quantized weights are compared with the CPU's before anything uses them.

Here the device is a CPU too. A kernel that is wrong on some card is played by one that is wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from torch import Tensor

from qlora_cli.errors import ModelError
from qlora_cli.models.product_check import ROWS, check_products
from tests.parity.tiny_layers import base

WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "NaN": lambda found: found * float("nan"),
    "zeros": torch.zeros_like,
    "twice the size": lambda found: 2 * found,
    "another row of the weight": lambda found: found.roll(1, -1),
    "half of the inputs left out": lambda found: 0.7 * found,
}


@pytest.fixture(scope="module", params=["nf4", "fp4"])
def quantized(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("base") / "base"
    return base("llama-wide", folder, torch.bfloat16, request.param)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_right_products_pass(quantized: Any, dtype: torch.dtype) -> None:
    state = torch.random.get_rng_state()
    check_products(quantized, dtype)
    assert torch.equal(torch.random.get_rng_state(), state), "the run would draw other numbers"


def test_model_without_quantized_weights_passes(tmp_path: Path) -> None:
    check_products(base("llama", tmp_path / "base", torch.float32, "none"), torch.float32)


@pytest.mark.parametrize("damage", WRONG)
@pytest.mark.parametrize("rows", ROWS)
def test_wrong_product_is_refused(
    quantized: Any, rows: int, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = bitsandbytes.matmul_4bit

    def wrong(x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        found: Tensor = right(x, *arguments, **options)
        return WRONG[damage](found) if len(x) == rows else found

    monkeypatch.setattr(bitsandbytes, "matmul_4bit", wrong)
    with pytest.raises(ModelError, match=f"a product of {rows} rows in bfloat16 differs") as caught:
        check_products(quantized, torch.bfloat16)
    assert "quantization.type=none" in str(caught.value.hint)


def test_float32_product_of_generation_is_checked_too(
    quantized: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = bitsandbytes.matmul_4bit

    def wrong(x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        found: Tensor = right(x, *arguments, **options)
        return 2 * found if x.dtype == torch.float32 else found

    monkeypatch.setattr(bitsandbytes, "matmul_4bit", wrong)
    with pytest.raises(ModelError, match="a product of 1 rows in float32 differs"):
        check_products(quantized, torch.bfloat16)


@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_eight_bit_products_are_checked(
    factor: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = base("llama-wide", tmp_path / "base", torch.bfloat16, "int8")
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear8bitLt):
            module.register_forward_hook(lambda *found: factor * found[-1])
    if factor == 1:
        check_products(model, torch.bfloat16)
    else:
        with pytest.raises(ModelError, match="a product of 1 rows in bfloat16 differs"):
            check_products(model, torch.bfloat16)
