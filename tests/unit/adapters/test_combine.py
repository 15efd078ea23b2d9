"""Combine several adapters into one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from qlora_cli.adapters.combine import METHODS, combine_adapters, write_adapter
from qlora_cli.adapters.low_rank import read_updates
from qlora_cli.adapters.switch import read_adapter
from qlora_cli.errors import ModelError
from tests.random_adapter import draw_adapter

DEFAULTS: dict[str, Any] = {"density": 0.5, "rank": None, "seed": 0}


def products(config: Any, saved: Any) -> dict[str, torch.Tensor]:
    return {name: update.b @ update.a for name, update in read_updates(config, saved).items()}


@pytest.fixture(scope="module")
def parents(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("parents")
    return [draw_adapter(tiny_model, folder / str(i), seed=i) for i in range(2)]


def test_linear_with_weights_one_and_zero_gives_the_first(parents: list[Path]) -> None:
    adapters = [read_adapter(parent) for parent in parents]
    made = products(*combine_adapters(adapters, [1, 0], method="linear", **DEFAULTS))
    first = products(*adapters[0])
    assert made.keys() == first.keys()
    for name, product in made.items():
        torch.testing.assert_close(product, first[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}], ids=str)
def test_cat_is_the_weighted_sum(
    tmp_path: Path, tiny_model: Path, settings: dict[str, Any]
) -> None:
    """PEFT leaves rsLoRA on in the result, whose scale would then not be 1."""
    adapters = [
        read_adapter(draw_adapter(tiny_model, tmp_path / str(i), seed=i, r=3 + i, **settings))
        for i in range(2)
    ]
    config, saved = combine_adapters(adapters, [0.7, -0.3], method="cat", **DEFAULTS)
    assert config.r == 7
    first, second = (products(*adapter) for adapter in adapters)
    for name, product in products(config, saved).items():
        wanted = 0.7 * first[name] - 0.3 * second[name]
        torch.testing.assert_close(product, wanted, rtol=1e-5, atol=1e-5)


# PEFT warns that a density of 1 drops nothing, which is meant here.
@pytest.mark.quick_every(3)
@pytest.mark.filterwarnings("ignore:The density 1.0")
@pytest.mark.parametrize("method", METHODS)
def test_each_method_gives_the_result_of_peft_on_the_model_itself(
    parents: list[Path], tiny_model: Path, method: str
) -> None:
    # Random dropping depends on the order of the modules, which differs here.
    density = 1.0 if "dare" in method else 0.5
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    model: Any = PeftModel.from_pretrained(base, parents[0], adapter_name="first")
    model.load_adapter(parents[1], adapter_name="second")
    model.add_weighted_adapter(
        ["first", "second"], [0.6, 0.4], "both", combination_type=method, density=density
    )
    config, saved = combine_adapters(
        [read_adapter(parent) for parent in parents],
        [0.6, 0.4],
        method=method,
        density=density,
        rank=None,
        seed=0,
    )
    modules = dict(model.base_model.model.named_modules())
    made = products(config, saved)
    assert len(made) == 14
    for name, product in made.items():
        delta = modules[name].get_delta_weight("both").double()
        torch.testing.assert_close(product, delta, rtol=1e-4, atol=1e-4)


def test_the_seed_fixes_random_dropping(parents: list[Path]) -> None:
    adapters = [read_adapter(parent) for parent in parents]

    def drawn(seed: int) -> torch.Tensor:
        made = combine_adapters(
            adapters, [0.5, 0.5], method="dare_linear", density=0.5, rank=None, seed=seed
        )
        return torch.cat([tensor.flatten() for tensor in made[1].values()])

    assert torch.equal(drawn(0), drawn(0))
    assert not torch.equal(drawn(0), drawn(1))


def test_the_result_is_an_ordinary_adapter(
    parents: list[Path], tiny_model: Path, tmp_path: Path
) -> None:
    adapters = [read_adapter(parent) for parent in parents]
    made = combine_adapters(adapters, [0.5, 0.5], method="svd", **{**DEFAULTS, "rank": 6})
    (tmp_path / "made").mkdir()
    write_adapter(*made, tmp_path / "made")
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    loaded = PeftModel.from_pretrained(base, tmp_path / "made")
    config = loaded.peft_config["default"]
    assert (config.r, config.lora_alpha, config.task_type) == (6, 6, "CAUSAL_LM")
    assert config.base_model_name_or_path == str(tiny_model)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"r": 8}, "same r value"),
        ({"exclude_modules": ["q_proj"]}, "different exclude_modules"),
    ],
)
def test_adapters_that_cannot_be_combined_are_refused(
    parents: list[Path], tiny_model: Path, tmp_path: Path, settings: dict[str, Any], reason: str
) -> None:
    other = draw_adapter(tiny_model, tmp_path / "other", seed=1, **settings)
    adapters = [read_adapter(path) for path in (parents[0], other)]
    with pytest.raises(ModelError, match=reason):
        combine_adapters(adapters, [0.5, 0.5], method="linear", **DEFAULTS)
