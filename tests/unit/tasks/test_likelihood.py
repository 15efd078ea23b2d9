"""Tasks that score given text by its likelihood, against plain forwards of one row at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from qlora_cli.data.prepared.labels import WAY_OUT
from qlora_cli.data.sources import BadRows
from qlora_cli.distributed.world import World
from qlora_cli.errors import DataError
from qlora_cli.evaluate.scorer import ModelScorer
from qlora_cli.tasks.classification import macro_f1
from qlora_cli.tasks.perplexity import slide
from qlora_cli.tasks.task import Outcome, read_tasks
from qlora_cli.types import IGNORE_INDEX

QUESTIONS = [
    {"question": "Which is even?\n", "choices": ["one", "two", "Å and more"], "answer": 1},
    {"question": "First?", "choices": ["a", "b"], "answer": "A"},
]


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def ask(recipe: Any, model: Any, **settings: Any) -> tuple[Any, list[Any], list[Outcome]]:
    tokenizer = recipe.model.load_tokenizer()
    student = ModelScorer("model", model, recipe, tokenizer, torch.float32, World(), **settings)
    [(task, questions)] = read_tasks(
        recipe.evaluation.tasks, recipe.data, tokenizer, limit=recipe.evaluation.limit
    )
    return task, list(questions), task.evaluate(student, questions)


@pytest.fixture
def model(tiny_model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_model)


def plain(model: Any, prompt: list[int], option: list[int]) -> float:
    """Compute the log-likelihood of `option` in one unpadded forward pass."""
    ids = torch.tensor([[*prompt, *option]])
    with torch.no_grad():
        log_p = torch.log_softmax(model.eval()(input_ids=ids).logits[0].double(), -1)
    return sum(float(log_p[len(prompt) + i - 1, token]) for i, token in enumerate(option))


@pytest.mark.parametrize("as_chat", [True, False])
@pytest.mark.parametrize("size", [1, 3, 16])
def test_options_are_as_likely_as_in_a_plain_forward_of_each(
    tiny_recipe: Callable[..., Any], model: Any, tmp_path: Path, size: int, as_chat: bool
) -> None:
    data = {"path": write_rows(tmp_path / "own.jsonl", QUESTIONS)}
    task = {"type": "multiple_choice", "as_chat": as_chat, "data": data}
    recipe = tiny_recipe(evaluation={"tasks": [task], "batch_size": size})
    tokenizer = recipe.model.load_tokenizer()
    _, questions, outcomes = ask(recipe, model)
    student = ModelScorer("model", model, recipe, tokenizer, torch.float32, World())
    for row, question, outcome in zip(QUESTIONS, questions, outcomes, strict=True):
        assert isinstance(row["choices"], list)
        if as_chat:
            turns = [{"role": "user", "content": row["question"]}]
            text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        else:
            text = row["question"]
        prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
        expected = [
            plain(model, prompt, tokenizer(("" if as_chat else " ") + option)["input_ids"])
            for option in row["choices"]
        ]
        found = student.log_likelihoods(question.examples)
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-6)
        assert outcome.prompt == text
        assert outcome.answer == row["choices"][int(np.argmax(expected))]
        per_byte = [
            p / len(option.encode()) for p, option in zip(expected, row["choices"], strict=True)
        ]
        right = 0 if row["answer"] == "A" else row["answer"]
        assert outcome.values == {
            "multiple_choice": np.argmax(expected) == right,
            "normalized": np.argmax(per_byte) == right,
        }


def test_options_of_one_token_share_a_forward(
    tiny_recipe: Callable[..., Any], model: Any, tmp_path: Path
) -> None:
    rows = [{"input": text, "output": "B"} for text in ("Answer:", "Say it. Answer:")]
    task = {
        "type": "multiple_choice",
        "question": "{{ input }}",
        "options": ["A", "B", "C", "D"],
        "answer": "{{ output }}",
        "data": {"path": write_rows(tmp_path / "own.jsonl", rows)},
    }
    seen = []
    model.model.register_forward_pre_hook(
        lambda _, __, inputs: seen.append(inputs["input_ids"].shape[0]), with_kwargs=True
    )
    recipe = tiny_recipe(evaluation={"tasks": [task], "batch_size": 8})
    _, questions, _ = ask(recipe, model)
    assert [question.answer for question in questions] == [1, 1]
    # A forward of one row before it finds out whether the model is decoder and head.
    assert seen == [1, 2]


def test_a_row_whose_answer_is_not_an_option_is_reported_with_its_place(
    tiny_recipe: Callable[..., Any], model: Any, tmp_path: Path
) -> None:
    rows = [*QUESTIONS, {**QUESTIONS[0], "answer": 3}, {**QUESTIONS[0], "answer": "Z"}]
    data = {"path": write_rows(tmp_path / "own.jsonl", rows)}
    recipe = tiny_recipe(evaluation={"tasks": [{"type": "multiple_choice", "data": data}]})
    with pytest.raises(
        DataError, match=r"2 bad rows\n.*own\.jsonl:3: answer '3' is not the letter or number"
    ):
        ask(recipe, model)
    skipping = tiny_recipe(
        data={"on_bad_row": "skip"},
        evaluation={"tasks": [{"type": "multiple_choice", "data": data}]},
    )
    assert len(ask(skipping, model)[1]) == 2


def test_training_rows_are_not_evaluated(
    tiny_recipe: Callable[..., Any], model: Any, tmp_path: Path
) -> None:
    rows = [
        {"prompt": f"say {i}", "completion": "B", "choices": ["A", "B"], "answer": "B"}
        for i in range(40)
    ]
    train = {
        "path": write_rows(tmp_path / "own.jsonl", rows), "format": {"type": "prompt_completion"},
    }  # fmt: skip
    recipe = tiny_recipe(
        data={"train": train, "evaluation": None, "evaluation_share": 0.3},
        evaluation={"tasks": [{"type": "multiple_choice", "question": "{{ prompt }}"}]},
    )
    [held_out] = recipe.data.evaluation_sources
    places = [row.place for row in held_out.conversations(BadRows())]
    assert 0 < len(places) < 40
    assert [question.place for question in ask(recipe, model)[1]] == places


def test_contradictory_settings_of_multiple_choice_are_refused(
    tiny_recipe: Callable[..., Any],
) -> None:
    def refused(message: str, **settings: Any) -> None:
        with pytest.raises(ValueError, match=message):
            tiny_recipe(evaluation={"tasks": [{"type": "multiple_choice", **settings}]})

    refused("line 1 of the template", question="{{ question")
    refused("system needs as_chat", system="Be brief.", as_chat=False)
    refused("format has no effect", data={"path": "a.jsonl", "format": {"type": "text"}})


@pytest.mark.parametrize("as_chat", [True, False])
@pytest.mark.parametrize("labels", [None, ["good", "bad", "neither"]])
def test_the_most_likely_label_is_chosen(
    tiny_recipe: Callable[..., Any],
    model: Any,
    tmp_path: Path,
    as_chat: bool,
    labels: list[str] | None,
) -> None:
    rows = [
        {"prompt": prompt, "completion": label if as_chat else f" {label}"}
        for prompt, label in (("fine", "good"), ("no", "bad"), ("well", "good"))
    ]
    data = {
        "path": write_rows(tmp_path / "own.jsonl", rows),
        "format": {"type": "prompt_completion", "as_chat": as_chat},
    }
    recipe = tiny_recipe(
        evaluation={"tasks": [{"type": "classification", "data": data, "labels": labels}]}
    )
    tokenizer = recipe.model.load_tokenizer()
    task, questions, outcomes = ask(recipe, model)
    names = labels or ["bad", "good"]
    for row, question, outcome in zip(rows, questions, outcomes, strict=True):
        prompt = tokenizer(question.prompt)["input_ids"]
        expected = [
            plain(model, prompt, tokenizer(name if as_chat else f" {name}")["input_ids"])
            for name in names
        ]
        assert outcome.answer == names[int(np.argmax(expected))]
        assert outcome.reference == row["completion"].strip()
        assert outcome.values["classification"] == (outcome.answer == outcome.reference)
    assert [name for name, _ in task.named_measures()] == [
        "classification",
        "classification.macro_f1",
    ]


def test_an_unlisted_label_is_reported_with_its_place(
    tiny_recipe: Callable[..., Any], model: Any
) -> None:
    task = {"type": "classification", "labels": ["yes", "no"]}
    recipe = tiny_recipe(evaluation={"tasks": [task]})
    with pytest.raises(DataError, match=r"rows\.jsonl:1: the answer 'ab' is not one of the labels"):
        ask(recipe, model)


def labelled(path: Path, *labels: str) -> dict[str, Any]:
    """Write rows with these labels, and return them as the data of a task."""
    rows = [{"prompt": f"q{i}", "completion": label} for i, label in enumerate(labels)]
    return {"path": write_rows(path, rows), "format": {"type": "prompt_completion"}}


@pytest.mark.parametrize(
    ("labels", "named"),
    [
        (["good", "Good", "bad", "good"], "'good' (2), 'Good' (1)"),
        (["very good", "very  good", "bad"], "'very good' (1), 'very  good' (1)"),
        (["good", "good ", "bad", "bad\n"], None),  # blanks around a label do not count
        (["us", "use"], None),
    ],
)
def test_labels_that_differ_only_in_blanks_or_case_are_named(
    tiny_recipe: Callable[..., Any],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    labels: list[str],
    named: str | None,
) -> None:
    data = labelled(tmp_path / "own.jsonl", *labels)
    recipe = tiny_recipe(evaluation={"tasks": [{"type": "classification", "data": data}]})
    [task] = recipe.evaluation.tasks
    task.read_items([task.data], recipe.model.load_tokenizer(), recipe.data, limit=None)
    said = [text for text in caplog.messages if "only in blanks or case" in text]
    assert len(said) == (named is not None)
    assert not named or f"are scored as different: {named}; {WAY_OUT}" in said[0]


@pytest.mark.parametrize("answer", ["Good", "GOOD ", "go od", "fine"])
def test_an_answer_that_differs_from_a_label_only_in_case_says_so(
    tiny_recipe: Callable[..., Any], tmp_path: Path, answer: str
) -> None:
    data = labelled(tmp_path / "own.jsonl", answer, "bad")
    task = {"type": "classification", "data": data, "labels": ["good", "bad"]}
    recipe = tiny_recipe(evaluation={"tasks": [task]})
    [read] = recipe.evaluation.tasks
    with pytest.raises(DataError, match="is not one of the labels good, bad") as caught:
        read.read_items([read.data], recipe.model.load_tokenizer(), recipe.data, limit=None)
    is_alike = answer.strip().lower() == "good"
    assert ("from 'good' only in blanks or case" in str(caught.value.hint)) is is_alike


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (["good ", "bad"], "found 'good '; answers are compared without blanks"),
        ([" good", "good"], "found ' good'"),
        (["good", "bad", "good"], "'good' is there twice"),
    ],
)
def test_labels_that_no_answer_can_have_are_refused(
    tiny_recipe: Callable[..., Any], labels: list[str], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        tiny_recipe(evaluation={"tasks": [{"type": "classification", "labels": labels}]})


def test_macro_f1_is_the_mean_over_labels() -> None:
    label, chosen = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, 2, 1])
    # By label: precision 2/2, 1/3, 0/1; recall 2/3, 1/2, 0/1.
    expected = (0.8 + 0.4 + 0.0) / 3
    assert macro_f1({"_label": label, "_chosen": chosen}) == pytest.approx(expected)
    # A label that a resample does not have is not counted there.
    both = {"_label": np.stack([label, label * 0]), "_chosen": np.stack([chosen, chosen * 0])}
    assert macro_f1(both) == pytest.approx([expected, 1.0])


@pytest.mark.parametrize("start", [[], [99]])
@pytest.mark.parametrize(("window", "stride"), [(8, 3), (8, 7), (100, 50), (5, 1)])
def test_each_token_is_counted_once_with_as_much_before_it_as_fits(
    window: int, stride: int, start: list[int]
) -> None:
    ids = list(range(23))
    counted = []
    for stop, example in slide(ids, window, stride, start):
        assert example.input_ids[: len(start)] == start
        assert len(example.input_ids) <= window + len(start)
        assert example.input_ids[-1] == ids[stop - 1]
        new = [label for label in example.labels if label != IGNORE_INDEX]
        if counted:
            assert len(example.input_ids) == window + len(start)
            assert example.labels[0] == IGNORE_INDEX, "something precedes what is counted"
        counted += new
    assert counted == ids


@pytest.mark.parametrize("size", [1, 4])
def test_perplexity_by_a_window_that_slides(
    tiny_recipe: Callable[..., Any], model: Any, tmp_path: Path, size: int
) -> None:
    texts = ["The quick brown fox jumps over the lazy dog. " * 2, "Ünï", "and so on " * 3]
    data = {"path": write_rows(tmp_path / "own.jsonl", [{"text": text} for text in texts])}
    task = {"type": "perplexity", "data": data, "window": 32, "stride": 10}
    recipe = tiny_recipe(evaluation={"tasks": [task], "batch_size": size})
    tokenizer = recipe.model.load_tokenizer()
    asked, _, outcomes = ask(recipe, model)
    nats = []
    for text, outcome in zip(texts, outcomes, strict=True):
        ids = tokenizer(text)["input_ids"]
        # Token by token: the window that reaches it first ends at 32, or at 10 more, and so on.
        expected = 0.0
        for i in range(1, len(ids)):
            end = min(32 if i < 32 else 32 + 10 * math.ceil((i + 1 - 32) / 10), len(ids))
            expected -= plain(model, ids[max(0, end - 32) : i], [ids[i]])
        nats.append(expected)
        assert outcome.values["nats"] == pytest.approx(expected, rel=1e-6)
        assert outcome.values["tokens"] == len(ids) - 1
        assert outcome.values["bytes"] == len(text.encode())
    values = {name: np.array([o.values[name] for o in outcomes]) for name in outcomes[0].values}
    found = {name: float(measure.aggregate(values)) for name, measure in asked.named_measures()}
    tokens = sum(len(tokenizer(text)["input_ids"]) - 1 for text in texts)
    assert found["perplexity"] == pytest.approx(math.exp(sum(nats) / tokens), rel=1e-6)
    size_in_bytes = len("".join(texts).encode())
    bits = sum(nats) / size_in_bytes / math.log(2)
    assert found["perplexity.bits_per_byte"] == pytest.approx(bits, rel=1e-6)


def test_rows_joined_to_one_document_are_counted_window_by_window(
    tiny_recipe: Callable[..., Any], model: Any, tmp_path: Path
) -> None:
    path = tmp_path / "text.txt"
    path.write_text("a line of text\n" * 8, encoding="utf-8")
    data = {"path": str(path)}
    task = {"type": "perplexity", "data": data, "window": 32, "stride": 16, "join": True}
    _, _, outcomes = ask(tiny_recipe(evaluation={"tasks": [task]}), model)
    assert outcomes[1].place == f"{path}, window 2"
    length = len(path.read_text(encoding="utf-8").rstrip("\n"))
    assert sum(o.values["tokens"] for o in outcomes) == length - 1
    assert sum(o.values["bytes"] for o in outcomes) == length


def test_windows_that_do_not_overlap_are_refused(tiny_recipe: Callable[..., Any]) -> None:
    task = {"type": "perplexity", "data": {"path": "a.txt"}, "window": 32, "stride": 32}
    with pytest.raises(ValueError, match=r"stride \(32\) must be less than window \(32\)"):
        tiny_recipe(evaluation={"tasks": [task]})
