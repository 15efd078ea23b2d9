"""Batched and streamed generation, greedy or sampled."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_cli.errors import DataError, RecipeError
from qlora_cli.inference.sampling import (
    Completion,
    GumbelSampler,
    Sampling,
    TextGenerator,
    TextStream,
)
from qlora_cli.types import Prompt
from tests.conftest import make_tokenizer, save_tiny_model


def load_generator(
    folder: Path, stop_token_ids: list[int], dtype: torch.dtype = torch.float32
) -> TextGenerator:
    return TextGenerator(
        AutoModelForCausalLM.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
        stop_token_ids,
        dtype,
        torch.device("cpu"),
    )


def test_the_head_gets_contiguous_rows(tiny_model: Path) -> None:
    """In bfloat16 on a CPU, torch copies the head's weights for each row of a view with gaps."""
    generator = load_generator(tiny_model, [], torch.bfloat16)
    seen: list[bool] = []

    def note(_: torch.nn.Module, inputs: tuple[torch.Tensor], __: torch.Tensor) -> None:
        seen.append(inputs[0].is_contiguous())

    head = generator.model.get_output_embeddings()
    head.register_forward_hook(note)
    prompts = [Prompt([65, 66, 67], ""), Prompt([68], "")]
    found = generator.complete(prompts, Sampling(max_new_tokens=3), batch_size=2)
    assert len(list(found)) == 2
    assert seen == [True] * 3
    assert not head._forward_pre_hooks, "the hook outlived the call"


def complete(model: Path, *, batch_size: int = 4, **settings: Any) -> list[Completion]:
    """Complete prompts of different lengths; return the completions in the prompts' order."""
    prompts = [Prompt([65 + i] * (1 + 3 * i), "") for i in range(4)]
    generator = load_generator(model, [256])
    found = dict(generator.complete(prompts, Sampling(**settings), batch_size=batch_size))
    return [found[i] for i in range(len(prompts))]


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.5}, {"temperature": 1.0, "top_k": 5}])
def test_a_completion_does_not_depend_on_the_rest_of_its_batch(
    tiny_model: Path, settings: dict[str, Any]
) -> None:
    together = complete(tiny_model, batch_size=4, max_new_tokens=12, **settings)
    alone = complete(tiny_model, batch_size=1, max_new_tokens=12, **settings)
    assert [one.text for one in together] == [one.text for one in alone]
    assert [one.num_tokens for one in together] == [one.num_tokens for one in alone]


def test_the_seed_fixes_the_samples(tiny_model: Path) -> None:
    first, again, other = (
        complete(tiny_model, temperature=2.0, max_new_tokens=12, seed=seed) for seed in (0, 0, 1)
    )
    assert first == again
    assert [one.text for one in first] != [one.text for one in other]


def test_sampling_from_a_single_token_is_greedy(tiny_model: Path) -> None:
    greedy = complete(tiny_model, max_new_tokens=8)
    assert complete(tiny_model, max_new_tokens=8, temperature=1.0, top_k=1) == greedy
    assert complete(tiny_model, max_new_tokens=8, temperature=1.0, top_p=1e-6) == greedy


def test_sampled_frequencies_match_the_probabilities() -> None:
    scores = torch.tensor([[0.0, 1.0, 2.0, -1.0]]).expand(4000, 4)
    sampler = GumbelSampler(Sampling(temperature=0.5), range(4000), torch.device("cpu"))
    sampled = sampler(torch.zeros(4000, 1, dtype=torch.long), scores).argmax(-1)
    shares = torch.bincount(sampled, minlength=4) / 4000
    # Three standard deviations of a share of 4,000 are 0.024 at most.
    torch.testing.assert_close(shares, (scores[0] / 0.5).softmax(-1), atol=0.024, rtol=0)


def test_noise_of_a_row_on_the_cpu_is_that_of_its_own_generator() -> None:
    """On a card it is drawn there; on a CPU, answers of earlier versions stay as they were."""
    sampler = GumbelSampler(Sampling(temperature=1.0, seed=3), [5, 9], torch.device("cpu"))
    scores = torch.zeros(2, 64)
    found = sampler(torch.zeros(2, 1, dtype=torch.long), scores)
    for row, index in zip(found, (5, 9), strict=True):
        seed = int(hashlib.sha256(f"3 {index}".encode()).hexdigest()[:14], 16)
        drawn = torch.empty(64).exponential_(generator=torch.Generator().manual_seed(seed))
        assert torch.equal(row, -drawn.log())


@pytest.mark.parametrize(
    ("family", "settings"), [("Llama", {}), ("Llama", {"temperature": 1.0}), ("OPT", {})]
)
def test_answers_end_where_the_context_is_full(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, family: str, settings: dict[str, Any]
) -> None:
    """OPT has a table of positions and fails beyond it."""
    folder = save_tiny_model(tmp_path / "model", family=family, max_position_embeddings=32)
    generator = load_generator(folder, [2**40])
    sampling = Sampling(max_new_tokens=10, **settings)

    def answers(prompts: list[Prompt], batch_size: int) -> list[Completion]:
        caplog.clear()
        found = dict(generator.complete(prompts, sampling, batch_size=batch_size))
        return [found[index] for index in range(len(prompts))]

    prompts = [Prompt([65 + i] * n, "") for i, n in enumerate([4, 22, 12, 28, 31, 28])]
    together = answers(prompts, 4)
    assert [one.num_tokens for one in together] == [10, 10, 10, 4, 1, 4]
    assert [record.getMessage() for record in caplog.records if record.name == "qlora"] == [
        "3 of 6 answers end where the model's context of 32 tokens is full, before 10 new tokens"
    ]
    assert answers(prompts, 1) == together
    assert answers(prompts[:3], 4) == together[:3]
    assert not [record for record in caplog.records if record.name == "qlora"]
    longer = [*prompts[:3], Prompt([65] * 32, "")]
    if family == "Llama":
        assert [one.num_tokens for one in answers(longer, 4)] == [10, 10, 10, 10]
        assert not [record for record in caplog.records if record.name == "qlora"]
        return
    with pytest.raises(DataError, match="prompt 3: the context is full: the prompt has 32 tokens"):
        answers(longer, 4)


def test_top_p_without_a_temperature_is_refused() -> None:
    with pytest.raises(RecipeError, match="no effect at temperature 0"):
        Sampling(top_p=0.9)


def test_a_character_of_several_tokens_is_written_once_it_is_complete() -> None:
    tokenizer = make_tokenizer()
    written: list[str] = []
    stream = TextStream(tokenizer, [], written.append)
    stream.put(torch.tensor([[1, 2, 3]]))
    for token in tokenizer("aé✓")["input_ids"]:
        stream.put(torch.tensor([token]))
    stream.end()
    assert written == ["a", "é", "✓"]


@pytest.mark.parametrize(
    ("generated", "text"),
    [
        ("finalParis", "Paris"),
        ("final", ""),
        ("fin", "fin"),
        ("finest", "finest"),
        ("Paris", "Paris"),
    ],
)
def test_the_lead_of_an_answer_is_not_written(generated: str, text: str) -> None:
    tokenizer = make_tokenizer()
    written: list[str] = []
    stream = TextStream(tokenizer, [], written.append, lead="final")
    stream.put(torch.tensor([[1, 2, 3]]))
    for token in tokenizer(generated)["input_ids"]:
        stream.put(torch.tensor([token]))
    stream.end()
    assert "".join(written) == text


def test_the_lead_of_an_answer_is_no_part_of_it(tiny_model: Path) -> None:
    generator, sampling = load_generator(tiny_model, []), Sampling(max_new_tokens=6)

    def answer(lead: str) -> list[str]:
        prompt, written = Prompt([65, 66], "", lead=lead), list[str]()
        [(_, found)] = generator.complete([prompt], sampling, batch_size=1)
        streamed = generator.stream(prompt, sampling, turn=0, write=written.append)
        assert found.num_tokens == 6
        return [found.text, streamed.text, "".join(written)]

    [whole, *_] = answer("")
    assert answer(whole[:2]) == [whole[2:]] * 3
    assert answer("other") == [whole] * 3


def test_a_stop_token_that_is_not_special_is_not_written() -> None:
    tokenizer = make_tokenizer()
    written: list[str] = []
    answer = tokenizer("yes\n")["input_ids"]
    stream = TextStream(tokenizer, [answer[-1]], written.append)
    stream.put(torch.tensor([[1, 2, 3]]))
    for token in answer:
        stream.put(torch.tensor([token]))
    stream.end()
    assert "".join(written) == "yes"
