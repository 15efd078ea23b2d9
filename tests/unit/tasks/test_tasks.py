"""Properties that every task shares."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from qlora_cli.data.render.chat_template import read_chat_template
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


ADD = {"name": "add", "parameters": {"type": "object", "required": ["a"]}}
ASKED = {"role": "user", "content": "2?"}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"name": "add", "arguments": {"a": 2}}],
}
CALLED = '<tool_call>{"name": "add", "arguments": {"a": 2}}</tool_call>'


@pytest.mark.parametrize(
    ("task", "reason"),
    [
        ("exact_match", None),
        ("numeric", None),
        ("json_match", "json_match needs JSON references; found .*tool_call"),
        ("classification", "the answer calls a tool \\(add\\)"),
    ],
)
def test_the_reference_of_a_tool_call_is_the_text_of_the_chat_template(
    tiny_recipe: Callable[..., Any], tmp_path: Path, task: str, reason: str | None
) -> None:
    own = tmp_path / "own.jsonl"
    own.write_text(json.dumps({"messages": [ASKED, CALL], "tools": [ADD]}), encoding="utf-8")
    recipe = tiny_recipe(
        data={"chat_template": "configs/chat_templates/chatml-tools.jinja"},
        evaluation={"tasks": [{"type": task, "data": {"path": str(own)}}]},
    )
    tokenizer = recipe.model.load_tokenizer(read_chat_template(recipe.data.chat_template))
    tasks = recipe.evaluation.tasks
    if reason is not None:
        with pytest.raises(DataError, match=rf"own\.jsonl:1: .*{reason}"):
            read_tasks(tasks, recipe.data, tokenizer, limit=None)
        return
    [(found, items)] = read_tasks(tasks, recipe.data, tokenizer, limit=None)
    for answer, score in ((CALLED, 1.0), ("", 0.0)):
        [outcome] = found.evaluate(Parrot({CALLED: answer}), items)
        assert (outcome.reference, outcome.values) == (CALLED, {task: score})


@pytest.mark.parametrize("task", ["exact_match", "classification"])
def test_the_tools_of_a_row_are_in_the_prompt_of_a_task(
    tiny_recipe: Callable[..., Any], tmp_path: Path, task: str
) -> None:
    own = tmp_path / "own.jsonl"
    rows = [{"prompt": "a?", "completion": label, "tools": [ADD]} for label in ("yes", "no")]
    own.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    data = {"path": str(own), "format": {"type": "prompt_completion"}}
    recipe = tiny_recipe(
        data={"chat_template": "configs/chat_templates/chatml-tools.jinja"},
        evaluation={"tasks": [{"type": task, "data": data}]},
    )
    tokenizer = recipe.model.load_tokenizer(read_chat_template(recipe.data.chat_template))
    [(_, items)] = read_tasks(recipe.evaluation.tasks, recipe.data, tokenizer, limit=None)
    for item in items:
        prompt = item.text if isinstance(item, Prompt) else item.prompt
        assert json.dumps(ADD) in prompt


THOUGHT = "<think>\n2 + 2\n</think>\n\n"
EMPTY = "<think>\n\n</think>\n\n"


@pytest.mark.parametrize(
    ("task", "reference", "answer"),
    [
        (ExactMatch(), "4", f"{EMPTY}4"),
        (ExactMatch(), "4", "\n</think>\n\n4"),
        (ExactMatch(), f"{EMPTY}4", "4"),
        (ExactMatch(), f"{THOUGHT}4", f"{THOUGHT}4"),
        (ExactMatch(anywhere=True), f"{THOUGHT}4", "It is 4."),
        (ExactMatch(pattern="[0-9]$"), f"{THOUGHT}4", f"{THOUGHT}It is 4"),
        (JsonMatch(), '{"a": 4}', f'{EMPTY}{{"a": 4.0}}'),
        (JsonMatch(), f"{THOUGHT}[4]", f"{EMPTY}[4]"),
        (JsonMatch(), '{"a": "</think>"}', '{"a": "</think>"}'),
    ],
    ids=str,
)
def test_reasoning_before_a_right_answer_does_not_make_it_wrong(
    task: Any, reference: str, answer: str
) -> None:
    prompt = Prompt([1], reference)
    [outcome] = task.evaluate(Parrot({reference: answer}), [prompt])
    assert list(outcome.values.values()) == [1.0]
    assert (outcome.reference, outcome.answer) == (reference, answer)


TABLE, ROPE = (ModelContext(64, is_table=one) for one in (True, False))


@pytest.fixture
def read(
    tiny_recipe: Callable[..., Any], tmp_path: Path
) -> Callable[[dict[str, Any], ModelContext | None, str], list[str]]:
    """Read the items of one task on two rows, the second beyond a context of 64; their places."""
    own = tmp_path / "own.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]}
        | {"question": text, "choices": ["1", "2"], "answer": "0", "text": text}
        for text, answer in (("ab", "1"), ("b" * 65, "2"))
    ]
    own.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def read(task: dict[str, Any], context: ModelContext | None, on_bad_row: str) -> list[str]:
        recipe = tiny_recipe(
            evaluation={"tasks": [{**task, "name": "own", "data": {"path": str(own)}}]},
            data={
                "train": {"path": str(own)}, "evaluation": None, "max_length": 300,
                "on_bad_row": on_bad_row,
            },
        )  # fmt: skip
        [(one, items)] = read_tasks(
            recipe.evaluation.tasks,
            recipe.data,
            recipe.model.load_tokenizer(),
            limit=None,
            context=context,
        )
        return [one.place_and_length(item)[0].rpartition(":")[2] for item in items]

    return read


ROW_TASKS: list[dict[str, Any]] = [
    {"type": "exact_match"},
    {"type": "loss"},
    {"type": "multiple_choice"},
    {"type": "classification", "labels": ["1", "2"]},
    {"type": "perplexity", "window": 400},
]


@pytest.mark.parametrize("task", ROW_TASKS, ids=lambda task: str(task["type"]))
def test_evaluation_rows_beyond_the_context_are_treated_like_training_rows(
    read: Callable[..., list[str]], task: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    assert read(task, None, "stop") == ["1", "2"]
    assert not caplog.records
    what = (
        r"evaluation \(own\): 1 of 2 rows do not fit into the model's context of "
        r"64 tokens, such as .*own\.jsonl:2, which takes at least \d+"
    )
    assert read(task, ROPE, "stop") == ["1", "2"]
    assert read(task, TABLE, "skip") == ["1"]
    warned, skipped = (record.message for record in caplog.records)
    assert re.fullmatch(what + ": the model was not trained on such positions", warned)
    assert re.fullmatch(what + ": skipped", skipped)
    with pytest.raises(DataError, match=what + "; it has no positions for them") as caught:
        read(task, TABLE, "stop")
    assert str(caught.value.hint).endswith("or leave them out with data.on_bad_row: skip")


def test_no_row_that_fits_is_refused_with_skip_too(read: Callable[..., list[str]]) -> None:
    with pytest.raises(DataError, match="2 of 2 rows do not fit"):
        read({"type": "exact_match"}, ModelContext(8, is_table=True), "skip")


def test_virtual_tokens_are_named_with_the_context(read: Callable[..., list[str]]) -> None:
    context = ModelContext(64, is_table=True, virtual_tokens=20)
    with pytest.raises(DataError, match=r"context of 64 tokens \(84 less 20 virtual tokens\)"):
        read({"type": "exact_match"}, context, "stop")


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


@pytest.mark.parametrize(
    ("tasks", "named"),
    [
        (["exact_match"], "exact_match"),
        (["numeric"], "numeric"),
        (["json_match", "exact_match"], "json_match, exact_match"),
        (["classification", "numeric"], "numeric"),
        (["classification"], None),
    ],
)
def test_references_longer_than_a_generated_answer_are_counted_before_the_model_is_loaded(
    tiny_recipe: Callable[..., Any],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    tasks: list[str],
    named: str | None,
) -> None:
    pairs = ("a", "1"), ("b", "1234567"), ("c", "123456789"), ("d", "2")
    own = write_rows(tmp_path / "own.jsonl", *pairs)
    source = {"path": str(own), "format": {"type": "prompt_completion"}}
    recipe = tiny_recipe(
        data={"evaluation": source}, evaluation={"tasks": [{"type": task} for task in tasks]}
    )
    tokenizer = recipe.model.load_tokenizer()
    shorter, longest = (
        len(tokenizer(text, add_special_tokens=False).input_ids) for _, text in pairs[1:3]
    )

    def read(max_new_tokens: int, limit: int | None = None) -> list[str]:
        caplog.clear()
        read_tasks(
            recipe.evaluation.tasks, recipe.data, tokenizer, limit=limit,
            max_new_tokens=max_new_tokens,
        )  # fmt: skip
        return [one.message for one in caplog.records if one.levelname == "WARNING"]

    assert read(longest) == []
    warnings = read(shorter - 1)
    if named is None:
        assert warnings == []
        return
    [warning] = warnings
    assert warning.startswith(
        f"evaluation ({named}): 2 of 4 references have more tokens than evaluation.max_new_tokens "
        f"({shorter - 1}), such as {own}:2: "
    )
    assert warning.endswith(f"the longest reference has {longest}")
    assert len(read(longest - 1)) == 1
    assert read(shorter - 1, limit=1) == []
