"""How many positions a model was made for, by its config."""

from __future__ import annotations

from typing import Any

import pytest

from qlora_cli.errors import DataError, ModelError
from qlora_cli.models.context import check_prompts, limit_new_tokens, read_context
from qlora_cli.types import ModelContext, Prompt

LLAMA: dict[str, Any] = {"model_type": "llama", "max_position_embeddings": 4096}


@pytest.mark.parametrize(
    ("config", "length"),
    [
        (LLAMA, 4096),
        ({**LLAMA, "rope_scaling": None}, 4096),
        ({**LLAMA, "rope_scaling": {"type": "linear", "factor": 4.0}}, 16384),
        ({**LLAMA, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, 8192),
        # Llama 3.1 counts the scaled positions, and Qwen with YaRN the original ones.
        (
            {
                **LLAMA,
                "max_position_embeddings": 131072,
                "rope_scaling": {
                    "rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192,
                },
            },
            131072,
        ),
        (
            {
                **LLAMA,
                "max_position_embeddings": 32768,
                "rope_scaling": {
                    "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768,
                },
            },
            131072,
        ),
        ({**LLAMA, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, 4096),
        ({**LLAMA, "rope_parameters": {"full_attention": {"factor": 8.0}}}, 4096),
        ({"model_type": "gemma3", "text_config": {"max_position_embeddings": 8192}}, 8192),
        ({"model_type": "mpt", "max_seq_len": 2048}, 2048),
        ({"model_type": "bloom"}, None),
        ({"model_type": "mamba", "max_position_embeddings": None}, None),
        ({"model_type": "x", "max_position_embeddings": -1}, None),
    ],
)  # fmt: skip
def test_length_of_the_context(config: dict[str, Any], length: int | None) -> None:
    context = read_context(config)
    assert (context and context.length) == length
    assert context is None or not context.is_table


@pytest.mark.parametrize("config", [LLAMA, {"model_type": "gpt2", "n_positions": 4096}])
def test_virtual_tokens_take_positions(config: dict[str, Any]) -> None:
    context = read_context(config, 96)
    assert context is not None
    assert (context.length, context.virtual_tokens) == (4000, 96)
    assert context.text == "4,000 tokens (4,096 less 96 virtual tokens)"
    for number in (4096, 5000):
        with pytest.raises(
            ModelError, match=f"num_virtual_tokens .{number:,}.: the model has 4,096"
        ):
            read_context(config, number)
    assert read_context({"model_type": "bloom"}, 96) is None


@pytest.mark.parametrize(
    ("length", "wanted", "context", "limit"),
    [
        (10, 22, 32, 22), (10, 23, 32, 22), (31, 9, 32, 1), (1, 1, 32, 1), (500, 9, None, 9),
        # Beyond the context: positions are computed, and nothing is left to keep to.
        (32, 9, 32, 9), (40, 9, 32, 9),
    ],
)  # fmt: skip
def test_new_tokens_are_limited_to_the_context(
    length: int, wanted: int, context: int | None, limit: int
) -> None:
    known = None if context is None else ModelContext(context, is_table=False)
    assert limit_new_tokens(length, wanted, known) == limit


@pytest.mark.parametrize(
    ("lengths", "place", "message", "hint"),
    [
        (
            [3, 32],
            "",
            "prompt 1: the context is full: the prompt has 32 tokens",
            "shorten the prompt",
        ),
        ([40, 3, 33], "", "prompt 0: the context is full: the prompt has 40 tokens", "2 prompts"),
        ([32], "rows.jsonl:7", "rows.jsonl:7: the context is full", "shorten the prompt"),
        ([32], "", "the context is full", "shorten the prompt"),
    ],
)
def test_prompts_as_long_as_the_context_are_refused_or_one_warning(
    caplog: pytest.LogCaptureFixture, lengths: list[int], place: str, message: str, hint: str
) -> None:
    prompts = [Prompt([65] * length, "", place=place) for length in lengths]
    check_prompts(prompts, None)
    for is_table in (False, True):
        check_prompts(prompts, ModelContext(41, is_table=is_table))
    assert not caplog.records
    with pytest.raises(DataError) as caught:
        check_prompts(prompts, ModelContext(32, is_table=True))
    assert str(caught.value).startswith(message)
    assert str(caught.value).endswith("the model has room for 32 tokens")
    assert str(caught.value.hint).startswith(hint)
    check_prompts(prompts, ModelContext(32, is_table=False))
    [record] = caplog.records
    assert record.getMessage() == (
        f"{caught.value}: it was not trained on such positions; {caught.value.hint}"
    )


@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_learned_positions_are_a_table(kind: str) -> None:
    context = read_context({"model_type": kind, "n_positions": 1024})
    assert context is not None
    assert (context.length, context.is_table) == (1024, True)


@pytest.mark.parametrize("family", ["GPT2", "OPT", "GPTNeo", "Llama", "GPTNeoX", "Falcon"])
def test_models_with_a_table_of_positions_are_known(family: str) -> None:
    """Compare with the modules of transformers' model: an embedding with a row per position."""
    import torch
    import transformers
    from torch import nn

    changes = {"attention_types": [[["global"], 1]]} if family == "GPTNeo" else {}
    config = getattr(transformers, f"{family}Config")(num_hidden_layers=1, **changes)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    context = read_context(config.to_dict())
    assert context is not None
    tables = [
        module
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        and context.length <= module.num_embeddings <= context.length + 2
    ]
    assert context.is_table == bool(tables)
