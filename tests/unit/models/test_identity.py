"""Telling base models apart."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qlora_cli.models.identity import identify
from tests.conftest import save_tiny_model


def test_the_digest_of_a_model_depends_on_weights_and_not_on_files(
    tmp_path: Path, tiny_model: Path
) -> None:
    known = identify(tiny_model)
    assert known["architecture"] == "LlamaForCausalLM"
    sharded = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(tiny_model).save_pretrained(sharded, max_shard_size="20KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    assert identify(sharded) == known

    other = save_tiny_model(tmp_path / "other")
    assert identify(other) == known, "the same seed makes the same weights"
    file = other / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    assert identify(other) != known
