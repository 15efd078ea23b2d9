"""Generation speed is measured within the context of a model."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from qlora_cli.common.report import ABSENT
from qlora_cli.compare.latency import measure_latency
from qlora_cli.models.context import read_context
from tests.conftest import make_tokenizer


@pytest.mark.parametrize("positions", [3, 4, 16, 64, 65, 95, 96, 1024])
def test_speed_is_measured_in_a_short_context(positions: int) -> None:
    """The model looks its positions up in a table: one too many is an IndexError."""
    config = GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=260, n_positions=positions)
    found = measure_latency(
        GPT2LMHeadModel(config).eval(),
        make_tokenizer(),
        dtype=torch.float32,
        device=torch.device("cpu"),
        context=read_context(config.to_dict()),
        repeats=1,
    )
    assert found.error is ABSENT
    assert isinstance(found.tokens_per_second, float)
    assert found.tokens_per_second > 0


def test_a_context_without_room_is_the_reason_that_nothing_is_measured() -> None:
    config = GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=260, n_positions=4)
    found = measure_latency(
        GPT2LMHeadModel(config).eval(),
        make_tokenizer(),
        dtype=torch.float32,
        device=torch.device("cpu"),
        context=read_context(config.to_dict(), 2),
        repeats=1,
    )
    assert found.error == (
        "the model's context of 2 tokens (4 less 2 virtual tokens) is too short to generate in"
    )
