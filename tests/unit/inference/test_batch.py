"""Answers in batches, greedy or drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_cli.errors import RecipeError
from qlora_cli.inference.sampling import Answer, Sampling, _Draws, _Pieces, answers
from qlora_cli.types import Prompt
from tests.conftest import make_tokenizer


def test_the_head_is_given_rows_without_gaps(tiny_model: Path) -> None:
    """In bfloat16 on a CPU, torch copies the head's weights for each row of a view with gaps."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    seen: list[bool] = []

    def note(_: torch.nn.Module, inputs: tuple[torch.Tensor], __: torch.Tensor) -> None:
        seen.append(inputs[0].is_contiguous())

    head = model.get_output_embeddings()
    head.register_forward_hook(note)
    found = answers(
        model,
        [Prompt([65, 66, 67], ""), Prompt([68], "")],
        AutoTokenizer.from_pretrained(tiny_model),
        stop_token_ids=[],
        sampling=Sampling(max_new_tokens=3),
        batch_size=2,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
    )
    assert len(list(found)) == 2
    assert seen == [True] * 3
    assert not head._forward_pre_hooks, "the hook outlived the call"


def ask(model: Path, **settings: Any) -> list[Answer]:
    """Answers to prompts of different lengths, in their order."""
    batch_size = settings.pop("batch_size", 4)
    prompts = [Prompt([65 + i] * (1 + 3 * i), "") for i in range(4)]
    found = dict(
        answers(
            AutoModelForCausalLM.from_pretrained(model),
            prompts,
            AutoTokenizer.from_pretrained(model),
            stop_token_ids=[256],
            sampling=Sampling(**settings),
            batch_size=batch_size,
            dtype=torch.float32,
            device=torch.device("cpu"),
        )
    )
    return [found[i] for i in range(len(prompts))]


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.5}, {"temperature": 1.0, "top_k": 5}])
def test_an_answer_does_not_depend_on_its_companions(
    tiny_model: Path, settings: dict[str, Any]
) -> None:
    together = ask(tiny_model, batch_size=4, max_new_tokens=12, **settings)
    alone = ask(tiny_model, batch_size=1, max_new_tokens=12, **settings)
    assert [one.text for one in together] == [one.text for one in alone]
    assert [one.num_tokens for one in together] == [one.num_tokens for one in alone]


def test_what_is_drawn_is_fixed_by_the_seed(tiny_model: Path) -> None:
    first, again, other = (
        ask(tiny_model, temperature=2.0, max_new_tokens=12, seed=seed) for seed in (0, 0, 1)
    )
    assert first == again
    assert [one.text for one in first] != [one.text for one in other]


def test_of_one_likeliest_token_the_draw_is_greedy(tiny_model: Path) -> None:
    greedy = ask(tiny_model, max_new_tokens=8)
    assert ask(tiny_model, max_new_tokens=8, temperature=1.0, top_k=1) == greedy
    assert ask(tiny_model, max_new_tokens=8, temperature=1.0, top_p=1e-6) == greedy


def test_tokens_are_drawn_as_often_as_their_probability_says() -> None:
    scores = torch.tensor([[0.0, 1.0, 2.0, -1.0]]).expand(4000, 4)
    draws = _Draws(Sampling(temperature=0.5), range(4000))
    drawn = draws(torch.zeros(4000, 1, dtype=torch.long), scores).argmax(-1)
    shares = torch.bincount(drawn, minlength=4) / 4000
    # Three standard deviations of a share of 4,000 are 0.024 at most.
    torch.testing.assert_close(shares, (scores[0] / 0.5).softmax(-1), atol=0.024, rtol=0)


def test_top_p_without_a_temperature_is_refused() -> None:
    with pytest.raises(RecipeError, match="nothing is drawn at temperature 0"):
        Sampling(top_p=0.9)


def test_a_character_of_several_tokens_is_written_when_it_is_whole() -> None:
    tokenizer = make_tokenizer()
    written: list[str] = []
    pieces = _Pieces(tokenizer, [], written.append)
    pieces.put(torch.tensor([[1, 2, 3]]))
    for token in tokenizer("aé✓")["input_ids"]:
        pieces.put(torch.tensor([token]))
    pieces.end()
    assert written == ["a", "é", "✓"]


def test_a_stop_token_that_is_no_special_one_is_not_written() -> None:
    tokenizer = make_tokenizer()
    written: list[str] = []
    answer = tokenizer("yes\n")["input_ids"]
    pieces = _Pieces(tokenizer, [answer[-1]], written.append)
    pieces.put(torch.tensor([[1, 2, 3]]))
    for token in answer:
        pieces.put(torch.tensor([token]))
    pieces.end()
    assert "".join(written) == "yes"
