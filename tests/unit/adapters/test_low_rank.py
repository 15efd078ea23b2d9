"""Compute norms, angles and ranks of updates from their factors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from qlora_cli.adapters import LoRA
from qlora_cli.adapters.low_rank import Update, effective_rank, read_updates, weighted_sum
from qlora_cli.adapters.switch import read_adapter
from qlora_cli.errors import ModelError
from qlora_cli.inspect.adapters import inspect
from tests.random_adapter import draw_adapter


def drawn(rank: int, seed: int) -> Update:
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(shape, generator=generator) for shape in ((rank, 24), (40, rank)))
    return Update.of(a, b, 0.5)


def test_figures_from_factors_equal_the_products_figures() -> None:
    one, other = drawn(3, 0), drawn(5, 1)
    first, second = one.b @ one.a, other.b @ other.a
    assert one.norm() == pytest.approx(float(first.norm()), rel=1e-12)
    assert one.dot(other) == pytest.approx(float((first * second).sum()), rel=1e-10)
    assert one.distance(other) == pytest.approx(float((first - second).norm()), rel=1e-12)
    values = torch.linalg.svdvals(first)
    torch.testing.assert_close(one.singular_values(), values[:3], rtol=1e-12, atol=0)
    both = weighted_sum([one, other], [0.25, -2.0])
    torch.testing.assert_close(both.b @ both.a, 0.25 * first - 2.0 * second)


def test_the_distance_of_an_update_from_itself_is_zero() -> None:
    one = drawn(4, 0)
    assert one.distance(one) < 1e-12 * one.norm()


@pytest.mark.parametrize(
    ("values", "rank"),
    [
        ([2.0, 2.0, 2.0, 2.0], 4.0),
        ([5.0, 0.0, 0.0], 1.0),
        ([0.0, 0.0], 0.0),
        # Shares of 3/4 and 1/4: exp(3/4 ln 4/3 + 1/4 ln 4).
        ([3.0, 1.0], 1.7547653506033522),
    ],
)
def test_the_effective_rank_of_known_singular_values(values: list[float], rank: float) -> None:
    left = torch.linalg.qr(torch.randn(40, len(values), dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(24, len(values), dtype=torch.float64)).Q.T
    # A rotation between the factors does not change their product.
    turn = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64)).Q
    update = Update(
        turn.T @ right,
        left @ torch.diag(torch.tensor(values).double()) @ turn,
    )
    assert effective_rank(update.singular_values()) == pytest.approx(rank, abs=1e-9)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.self_attn.v_proj": 3}},
        {"target_modules": ["embed_tokens", "q_proj"]},
    ],
    ids=str,
)
def test_updates_equal_what_peft_adds_to_the_weights(
    tmp_path: Path, tiny_model: Path, settings: dict[str, Any]
) -> None:
    if "target_modules" in settings:
        from tests.conftest import save_tiny_model

        tiny_model = save_tiny_model(tmp_path / "untied", tie_word_embeddings=False)
    folder = draw_adapter(tiny_model, tmp_path / "adapter", seed=0, **settings)
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    adapted = LoRA().load(base, folder)
    updates = read_updates(*read_adapter(folder))
    modules = dict(adapted.base_model.model.named_modules())
    assert len(updates) == sum(hasattr(module, "get_delta_weight") for module in modules.values())
    for name, update in updates.items():
        delta = modules[name].get_delta_weight("default").double()
        product = update.b @ update.a
        if name.endswith("embed_tokens"):
            product = product.T
        torch.testing.assert_close(product, delta, rtol=1e-5, atol=1e-6)


# PEFT warns of patterns that it writes itself.
@pytest.mark.filterwarnings("ignore:.*_pattern keys")
def test_factors_of_experts_are_not_read_as_one_matrix(tmp_path: Path, tiny_model: Path) -> None:
    """Their A has the rows of all experts together, so the scale would be wrong."""
    settings = json.loads((tiny_model / "config.json").read_text("utf-8"))
    config = MixtralConfig(**{**settings, "model_type": "mixtral"}, num_local_experts=4)
    MixtralForCausalLM(config).save_pretrained(tmp_path / "base")
    folder = draw_adapter(tmp_path / "base", tmp_path / "adapter", seed=0)
    with pytest.raises(ModelError, match=r"target_parameters .*gate_up_proj.* cannot be read"):
        inspect(folder)
