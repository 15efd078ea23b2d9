"""Which stored matrix is which part of what the model holds in one tensor."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from qlora_cli.adapters.weight_edits import build_skeleton
from qlora_cli.models.shards import Shards
from qlora_cli.models.weight_names import WeightNames


@pytest.fixture
def mixtral(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=32,
        # Of eleven, a sort by name would put the tenth before the second.
        num_local_experts=11,
    )
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    return tmp_path


def test_pieces_are_what_transformers_puts_together(mixtral: Path) -> None:
    shards = Shards(mixtral)
    names = WeightNames(build_skeleton(mixtral, trust_remote_code=False), shards.tensors)
    model = AutoModelForCausalLM.from_pretrained(mixtral)
    counts = {whole.rpartition(".")[2]: len(pieces) for whole, pieces in names.parts.items()}
    assert counts == {"gate_up_proj": 22, "down_proj": 11}
    for whole, pieces in names.parts.items():
        tensor = model.get_parameter(whole)
        for one in pieces:
            held = tensor[one.expert, one.start : one.start + one.rows]
            assert torch.equal(shards.read(one.name), held)


def test_stacked_experts_with_a_gap_are_not_matched(mixtral: Path) -> None:
    stored = Shards(mixtral).tensors
    del stored[next(name for name in stored if name.endswith("experts.3.w1.weight"))]
    names = WeightNames(build_skeleton(mixtral, trust_remote_code=False), stored)
    assert [whole.rpartition(".")[2] for whole in names.parts] == ["down_proj"]
