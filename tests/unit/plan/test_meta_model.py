"""Test the models that are known by name."""

from __future__ import annotations

from collections.abc import Callable

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import (
    AutoConfig,
)

from qlora_cli.errors import ModelError
from qlora_cli.models.known_configs import KNOWN, find_known
from qlora_cli.plan.plan import plan
from qlora_cli.plan.trace.meta_model import build_meta_model
from qlora_cli.recipe.schema import Recipe
from tests.unit.plan.tiny import WEIGHTS


@pytest.mark.quick_every(4)
@pytest.mark.parametrize("name", WEIGHTS)
def test_known_configs_have_the_published_number_of_weights(name: str) -> None:
    model = build_meta_model(AutoConfig.for_model(**KNOWN[name]), torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) == WEIGHTS[name]


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Llama-3.1-8B"),
        ("unsloth/Llama-3.2-3B-Instruct", "meta-llama/Llama-3.2-3B"),
        ("meta-llama/Llama-2-7b-chat-hf", "meta-llama/Llama-2-7b-hf"),
        ("google/gemma-2-9b-it", "google/gemma-2-9b"),
        ("somebody/Llama-3.1-8B-Poetry", None),
    ],
)
def test_known_model_is_found_by_name(path: str, name: str | None) -> None:
    found = find_known(path)
    assert (found and found[0]) == name


def test_known_model_needs_no_hub(
    tiny_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    def have_no_network(*_: object, local_files_only: bool, **__: object) -> str:
        assert local_files_only
        raise LocalEntryNotFoundError("not in the cache")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", have_no_network)
    _, source = tiny_recipe(model={"path": "meta-llama/Llama-2-7b-chat-hf"}).model.read_config()
    assert source == "the dimensions of meta-llama/Llama-2-7b-hf known to qlora"


def test_unknown_model_is_refused(tiny_recipe: Callable[..., Recipe]) -> None:
    with pytest.raises(ModelError, match=r"no config.json found for nobody/nothing"):
        plan(tiny_recipe(model={"path": "nobody/nothing"}), device="cpu")
