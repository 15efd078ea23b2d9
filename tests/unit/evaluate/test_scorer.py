"""Compare the scorer with plain forward passes of the same model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from qlora_cli.distributed.world import World
from qlora_cli.evaluate.scorer import ModelScorer
from qlora_cli.models.tokenizer import set_stop_tokens
from qlora_cli.types import IGNORE_INDEX, Example, Prompt
from tests.conftest import save_tiny_model

EXAMPLES = [
    Example([5, 6, 7, 8], [IGNORE_INDEX, IGNORE_INDEX, 7, 8]),
    Example([9, 8, 7, 6, 5, 4, 3], [9, 8, 7, 6, 5, 4, 3]),
    Example([1, 2], [IGNORE_INDEX, 2]),
    Example([1, 2, 3, 4, 5], [IGNORE_INDEX, 2, IGNORE_INDEX, 4, IGNORE_INDEX]),
]


@pytest.fixture
def model(tiny_model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_model)


def scorer(recipe: Any, model: Any, **settings: Any) -> ModelScorer:
    tokenizer = recipe.model.load_tokenizer()
    return ModelScorer("model", model, recipe, tokenizer, torch.float32, World(), **settings)


def log_p(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0].double(), -1)


def plain(model: Any, example: Example) -> float:
    found = log_p(model, example.input_ids)
    pairs = list(enumerate(example.labels))[1:]
    return float(sum(found[i - 1, label] for i, label in pairs if label != IGNORE_INDEX))


@pytest.mark.parametrize("size", [1, 2, 3, 16])
def test_batched_likelihoods_equal_row_by_row_likelihoods(
    tiny_recipe: Callable[..., Any], model: Any, size: int
) -> None:
    found = scorer(tiny_recipe(evaluation={"batch_size": size}), model).log_likelihoods(EXAMPLES)
    assert found == pytest.approx([plain(model, example) for example in EXAMPLES], abs=1e-5)


def test_likelihoods_of_a_model_that_is_not_just_decoder_and_head(
    tiny_recipe: Callable[..., Any],
) -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    capped = Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=260,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            final_logit_softcapping=0.5,
        )
    )
    found = scorer(tiny_recipe(), capped).log_likelihoods(EXAMPLES)
    capped.eval()
    assert found == pytest.approx([plain(capped, example) for example in EXAMPLES], abs=1e-4)


def test_divergence_is_the_sum_over_positions(
    tiny_recipe: Callable[..., Any], model: Any, tmp_path: Path
) -> None:
    other = AutoModelForCausalLM.from_pretrained(
        save_tiny_model(tmp_path / "other", initializer_range=0.1)
    )

    @contextmanager
    def as_base() -> Iterator[Any]:
        yield other

    found = scorer(tiny_recipe(), model, as_base=as_base).divergences(EXAMPLES[:2])
    expected = []
    for example in EXAMPLES[:2]:
        p, q = log_p(other, example.input_ids), log_p(model, example.input_ids)
        expected.append(float((p.exp() * (p - q)).sum()))
    assert found == pytest.approx(expected, rel=1e-5)
    assert all(value > 0 for value in found)
    # The divergence of the base from itself is zero.
    assert scorer(tiny_recipe(), model).divergences(EXAMPLES[:2]) == [0, 0]


def test_a_prompt_is_answered_once(
    tiny_recipe: Callable[..., Any], model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_stop_tokens(model, [])
    asked: list[int] = []
    generate = model.generate

    def count(input_ids: torch.Tensor, **settings: Any) -> Any:
        asked.append(len(input_ids))
        return generate(input_ids=input_ids, **settings)

    monkeypatch.setattr(model, "generate", count)
    student = scorer(tiny_recipe(evaluation={"max_new_tokens": 3}), model)
    prompts = [Prompt([5, 6], "a"), Prompt([7], "b"), Prompt([5, 6], "c")]
    first = student.generate(prompts)
    assert first[0] == first[2]
    assert student.generate(prompts[:2]) == first[:2]
    assert sum(asked) == 2
