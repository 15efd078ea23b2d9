"""Switch between several adapters on one base in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from qlora_cli.adapters import LoRA
from qlora_cli.adapters.switch import AdapterSet
from qlora_cli.errors import ModelError
from tests.conftest import save_tiny_model
from tests.random_adapter import draw_adapter

IDS = torch.arange(5, 25)[None]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=IDS).logits
    return found


def alone(model: Path, adapter: Path | None) -> torch.Tensor:
    base = AutoModelForCausalLM.from_pretrained(model)
    return logits(base if adapter is None else LoRA().load(base, adapter))


def test_swapped_adapters_compute_bit_for_bit_the_same_as_alone(
    tmp_path: Path, tiny_model: Path
) -> None:
    kinds: dict[str, dict[str, Any]] = {
        "plain": {},
        "wide": {"r": 8, "use_rslora": True},
        "few.modules": {"target_modules": ["q_proj"]},
        "dora": {"use_dora": True},
        "head": {"modules_to_save": ["lm_head"]},
    }
    folders = {
        name: draw_adapter(tiny_model, tmp_path / name, seed=i, **settings)
        for i, (name, settings) in enumerate(kinds.items())
    }
    expected = {name: alone(tiny_model, folder) for name, folder in folders.items()}
    plain = alone(tiny_model, None)

    adapters = AdapterSet(AutoModelForCausalLM.from_pretrained(tiny_model))
    for name, folder in folders.items():
        adapters.add(name, folder)
    for name in [*folders, *reversed(folders)]:
        with adapters.using(name) as model:
            assert torch.equal(logits(model), expected[name]), name
        with adapters.using(None) as model:
            assert torch.equal(logits(model), plain), f"the base, after {name}"
    assert not torch.equal(plain, expected["plain"])


def test_an_adapter_of_a_base_with_other_shapes_is_refused(
    tmp_path: Path, tiny_model: Path
) -> None:
    other = save_tiny_model(tmp_path / "other", hidden_size=64)
    folder = draw_adapter(other, tmp_path / "adapter", seed=0)
    adapters = AdapterSet(AutoModelForCausalLM.from_pretrained(tiny_model))
    with pytest.raises(
        ModelError, match=r"does not fit .* wrong shape: .* \(64, 4\) instead of \(32, 4\)"
    ):
        adapters.add("other", folder)


def test_an_adapter_that_lacks_a_tensor_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = draw_adapter(tiny_model, tmp_path / "adapter", seed=0)
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors.pop(next(iter(tensors)))
    save_file(tensors, folder / "adapter_model.safetensors")
    adapters = AdapterSet(AutoModelForCausalLM.from_pretrained(tiny_model))
    with pytest.raises(
        ModelError, match=r"does not fit the base model; missing: \S+\.lora_[AB]\.weight$"
    ):
        adapters.add("torn", folder)


def test_an_adapter_whose_initialization_changed_the_base_is_refused(
    tmp_path: Path, tiny_model: Path
) -> None:
    folder = draw_adapter(tiny_model, tmp_path / "adapter", seed=0)
    config = folder / "adapter_config.json"
    text = config.read_text(encoding="utf-8")
    changed = text.replace('"init_lora_weights": true', '"init_lora_weights": "pissa"')
    assert changed != text
    config.write_text(changed, encoding="utf-8")
    adapters = AdapterSet(AutoModelForCausalLM.from_pretrained(tiny_model))
    with pytest.raises(ModelError, match=r"init_lora_weights \(pissa\) changed the base"):
        adapters.add("pissa", folder)
