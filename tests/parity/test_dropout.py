"""Test the dropout of LoRA in fused layers: its masks, and gradients with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qlora_cli.kernels.decoder_layer import Recompute
from qlora_cli.kernels.dropout import SeededDropout, draw_dropouts
from qlora_cli.objectives.supervised import TokenLoss
from tests.parity.tiny_layers import (
    DOCUMENTS,
    adapted,
    base,
    batch,
    distance,
    fused,
    loss_and_gradients,
)

RATE = 0.3
GROUPS = (
    ("q_proj", "k_proj", "v_proj"),
    ("o_proj",),
    ("gate_proj", "up_proj"),
    ("down_proj",),
)
"""Linear layers with the same mask."""


class FixedDropout(nn.Module):
    """Multiply by given factors (T, in)."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, x: Tensor) -> Tensor:
        return x * self.mask if self.training else x


def fix_masks(model: Any) -> None:
    """Give PEFT's layers the masks that fused layers draw with the same random state."""
    for layer in model.base_model.model.model.layers:
        for names, dropout in zip(GROUPS, draw_dropouts([RATE] * 4), strict=True):
            assert dropout is not None
            for name in names:
                half = layer.mlp if hasattr(layer.mlp, name) else layer.self_attn
                linear = getattr(half, name)
                mask = dropout.apply(torch.ones(sum(DOCUMENTS), linear.in_features))
                linear.lora_dropout["default"] = FixedDropout(mask)


@pytest.mark.parametrize("recompute", ["none", "mlp", "all"])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_gradients_equal_those_of_peft_with_the_same_masks(
    tmp_path: Path, kind: str, quantization: str, recompute: Recompute
) -> None:
    def model(*, ours: bool) -> Any:
        held = base(kind, tmp_path / "base", torch.float32, quantization)
        return adapted(held, ours=ours, lora_dropout=RATE)

    reference = model(ours=False)
    batch()  # sets the random state in which both passes begin
    fix_masks(reference)
    expected, gradients = loss_and_gradients(reference, torch.float32)
    without, _ = loss_and_gradients(
        adapted(base(kind, tmp_path / "base", torch.float32, quantization), ours=False),
        torch.float32,
    )
    found, ours = loss_and_gradients(fused(model(ours=True), recompute), torch.float32)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    assert distance(ours, gradients) < 1e-5
    assert abs(found - without) > 1e-3 * without


def test_each_pass_draws_other_masks_and_the_same_state_the_same(tmp_path: Path) -> None:
    model = fused(
        adapted(
            base("llama", tmp_path / "base", torch.float32, "none"), ours=True, lora_dropout=RATE
        )
    )
    objective, tokens = TokenLoss(model, torch.float32), batch()

    def losses() -> list[float]:
        torch.manual_seed(5)
        return [float(objective(tokens)[0].detach()) for _ in range(3)]

    assert losses() == losses()
    assert len(set(losses())) == 3


def test_nothing_is_dropped_in_evaluation_mode(tmp_path: Path) -> None:
    def model(**changes: Any) -> Any:
        held = base("llama", tmp_path / "base", torch.float32, "none")
        return fused(adapted(held, ours=True, **changes)).eval()

    expected, gradients = loss_and_gradients(model(), torch.float32)
    found, ours = loss_and_gradients(model(lora_dropout=RATE), torch.float32)
    assert torch.equal(found, expected)
    assert all(torch.equal(ours[name], one) for name, one in gradients.items())


@pytest.mark.parametrize("rate", [0.05, 0.3, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_masks_have_the_rate_and_keep_the_mean(rate: float, dtype: torch.dtype) -> None:
    values = torch.full((500, 400), 3.0, dtype=dtype)
    dropout = SeededDropout(rate, seed=2**61 + 7)
    found = dropout.apply(values)
    share = float((found == 0).float().mean())
    deviation = (rate * (1 - rate) / found.numel()) ** 0.5
    assert share == pytest.approx(rate, abs=5 * deviation)
    kept = found[found != 0].unique()
    assert len(kept) == 1
    assert float(kept) == pytest.approx(3.0 / (1 - rate), rel=8 * torch.finfo(dtype).eps)
    assert torch.equal(found, dropout.apply(values))
    assert torch.equal(found, dropout.apply(values.t().contiguous().t()))  # in any layout
    other = SeededDropout(rate, seed=2**61 + 8).apply(values)
    assert not torch.equal(found, other)
    rows = (found == 0).float().mean(1)  # each row has its own
    assert float(rows.std()) == pytest.approx((rate * (1 - rate) / 400) ** 0.5, rel=0.2)


def test_rates_of_zero_draw_nothing() -> None:
    before = torch.get_rng_state()
    assert draw_dropouts([0.0, 0.0]) == [None, None]
    assert torch.equal(torch.get_rng_state(), before)
    first, second = draw_dropouts([0.0, 0.5])
    assert first is None
    assert second is not None
    assert second.rate == 0.5
