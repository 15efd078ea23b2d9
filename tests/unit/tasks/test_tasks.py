"""Properties that every task shares."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from qlora_cli.errors import DataError
from qlora_cli.tasks import ExactMatch, JsonMatch
from qlora_cli.tasks.task import read_tasks
from qlora_cli.types import Example, ModelContext, Prompt


class Parrot:
    """A model that looks its answer up by the prompt's reference, and else says `?`."""

    def __init__(self, answers: dict[str, str]) -> None:
        self._answers = answers

    def generate(self, prompts: Sequence[Prompt]) -> list[str]:
        return [self._answers.get(prompt.reference, "?") for prompt in prompts]

    def log_likelihoods(self, examples: Sequence[Example]) -> list[float]:
        raise AssertionError("no likelihood was due")


def write_rows(path: Path, *pairs: tuple[str, str]) -> Path:
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_task_asks_about_held_out_rows_or_about_rows_of_its_own(
    tiny_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    own = write_rows(tmp_path / "own.jsonl", ("1 + 1", "2"), ("1 + 2", "3"))
    data = {"path": str(own), "format": {"type": "prompt_completion"}}
    recipe = tiny_recipe(
        evaluation={
            "tasks": [
                {"type": "exact_match"},
                {"type": "exact_match", "name": "sums", "data": data},
            ]
        }
    )
    tokenizer = recipe.model.load_tokenizer()
    (first, held_out), (second, sums) = read_tasks(
        recipe.evaluation.tasks, recipe.data, tokenizer, limit=recipe.evaluation.limit
    )
    assert [first.label, second.label] == ["exact_match", "sums"]
    assert len(held_out) == 6
    assert [question.reference for question in sums] == ["2", "3"]
    outcomes = second.evaluate(Parrot({"2": " 2\n", "3": "4"}), sums)
    assert [outcome.values for outcome in outcomes] == [{"exact_match": 1}, {"exact_match": 0}]
    assert outcomes[1].place.endswith("own.jsonl:2")
    assert "1 + 2" in outcomes[1].prompt
    assert outcomes[1].answer == "4"

    limited = recipe.model_copy(
        update={"evaluation": recipe.evaluation.model_copy(update={"limit": 1})}
    )
    task_items = read_tasks(
        limited.evaluation.tasks, limited.data, tokenizer, limit=limited.evaluation.limit
    )
    assert [len(questions) for _, questions in task_items] == [1, 1]


def test_a_task_with_rows_of_its_own_needs_no_held_out_rows(
    tiny_recipe: Callable[..., Any],
) -> None:
    own = {"type": "exact_match", "data": {"path": "own.jsonl"}}
    recipe = tiny_recipe(data={"evaluation": None}, evaluation={"tasks": [own]})
    assert recipe.data.evaluation_sources == []
    with pytest.raises(ValueError, match=r"needs data\.evaluation"):
        tiny_recipe(data={"evaluation": None}, evaluation={"tasks": [{"type": "exact_match"}]})


def test_two_tasks_of_one_name_are_refused(tiny_recipe: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match='duplicate task name "exact_match"; rename one'):
        tiny_recipe(evaluation={"tasks": [{"type": "exact_match"}] * 2})


def test_a_reference_that_cannot_be_scored_against_is_named_with_its_place(
    tiny_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    own = write_rows(tmp_path / "own.jsonl", ("a", "{}"), ("b", "no JSON"))
    data = {"path": str(own), "format": {"type": "prompt_completion"}}
    recipe = tiny_recipe(evaluation={"tasks": [{"type": "json_match", "data": data}]})
    with pytest.raises(DataError, match=r"own\.jsonl:2: .*json_match needs JSON references"):
        read_tasks(
            recipe.evaluation.tasks,
            recipe.data,
            recipe.model.load_tokenizer(),
            limit=recipe.evaluation.limit,
        )


def test_a_prompt_as_long_as_the_context_is_named_before_the_model_is_loaded(
    tiny_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    own = write_rows(tmp_path / "own.jsonl", ("a", "1"), ("b" * 64, "2"))
    data = {"path": str(own), "format": {"type": "prompt_completion"}}
    recipe = tiny_recipe(evaluation={"tasks": [{"type": "exact_match", "data": data}]})
    with pytest.raises(DataError, match=r"own\.jsonl:2: the context is full: .* room for 64"):
        read_tasks(
            recipe.evaluation.tasks,
            recipe.data,
            recipe.model.load_tokenizer(),
            limit=None,
            context=ModelContext(64, is_table=False),
        )


def test_exact_match() -> None:
    assert ExactMatch().score("Paris", " Paris\n") == 1
    assert ExactMatch().score("Paris", "paris") == 0


def test_a_number_of_thousands_of_digits_is_a_wrong_answer() -> None:
    assert JsonMatch().score("[1]", f"[{'9' * 5000}]") == 0
    with pytest.raises(DataError, match="needs JSON references"):
        JsonMatch().score("9" * 5000, "1")


def test_json_match() -> None:
    assert JsonMatch().score('{"a": 1, "b": 2}', '{"b":2,"a":1}') == 1
    assert JsonMatch().score("[1]", "[true]") == 0
    assert JsonMatch().score("[1]", "[1") == 0
    assert JsonMatch().score("[5, 0.5]", "[5.0, 5e-1]") == 1
    assert JsonMatch().score("[5]", "[5.1]") == 0
    assert JsonMatch().score("[5]", "[1e999]") == 0
