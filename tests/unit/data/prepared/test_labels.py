"""Labels that differ only in blanks or case are named, with their rows and the way out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_cli.data.prepared.audit import check_data
from qlora_cli.data.prepared.cache import read_data
from qlora_cli.data.prepared.labels import (
    WAY_OUT,
    LabelCounter,
    find_label_variants,
    label_variants,
    plain_label,
)
from qlora_cli.data.sources import Source
from qlora_cli.inspect.preview import preview
from qlora_cli.types import Conversation, Message


def row(*answers: str) -> Conversation:
    turns = [Message("user", "a", train=False)]
    for answer in answers:
        turns.append(Message("assistant", answer, train=True))
    return Conversation(turns)


def labels(*answers: str) -> dict[str, int]:
    counter = LabelCounter()
    for answer in answers:
        counter.add(row(answer))
    return counter.labels()


@pytest.mark.parametrize(
    ("other", "is_alike"),
    [
        ("positive ", True),
        (" positive", True),
        ("positive\n", True),
        ("positive\u00a0", True),
        ("Positive", True),
        ("POSITIVE\t", True),
        ("positively", False),
        ("posi tive", False),
        ("positive.", False),
    ],
)
def test_labels_that_readers_cannot_tell_apart_are_found(other: str, is_alike: bool) -> None:
    counts = {"positive": 5, "negative": 7, other: 2}
    assert label_variants(counts) == ([{"positive": 5, other: 2}] if is_alike else [])
    found = find_label_variants(counts, {})
    assert (found is not None) is is_alike
    if found is not None:
        assert (found.count, found.total) == (2, 14)
        assert found.named == (f"'positive' (5), {other!r} (2)",)
        assert found.remedy == (WAY_OUT,)


MIXED = {"positive": 5, "positive ": 2}


@pytest.mark.parametrize(
    ("format", "counts", "way_out"),
    [
        (
            {"type": "template", "user": "{{ Nachricht }}", "assistant": "{{Kategorie}}"},
            MIXED,
            'data.evaluation.format.assistant: "{{ Kategorie | trim }}"',
        ),
        (
            {"type": "prompt_completion", "prompt_field": "Größe", "completion_field": "Art"},
            MIXED,
            'data.evaluation.format: {type: template, user: "{{ Größe }}", '
            'assistant: "{{ Art | trim }}"}',
        ),
        ({"type": "template", "assistant": "Label: {{ label }}"}, MIXED, None),
        ({"type": "prompt_completion", "system": "Be brief."}, MIXED, None),
        ({"type": "messages"}, MIXED, None),
        # The filter `trim` leaves case as it is.
        ({"type": "template"}, {"positive": 5, "Positive": 2}, None),
    ],
)
def test_the_way_out_names_the_columns_of_the_file(
    format: dict[str, str], counts: dict[str, int], way_out: str | None
) -> None:
    source = Source.model_validate({"path": "a.csv", "format": format})
    found = find_label_variants(counts, {}, [source], "data.evaluation")
    assert found is not None
    assert found.remedy == (
        (f"{WAY_OUT}; {way_out} removes the blanks around them",) if way_out else (WAY_OUT,)
    )


@pytest.mark.parametrize("number", [1, 3, 4, 6])
def test_label_groups_that_are_not_named_are_counted(number: int) -> None:
    counts = {label: 2 for i in range(number) for label in (f"label {i}", f"LABEL {i}")}
    found = find_label_variants(counts, {})
    assert found is not None
    assert len(found.named) == min(number, 3)
    assert found.first_named()[3:] == ((f"and {number - 3} more",) if number > 3 else ())


def test_runs_of_blanks_inside_do_not_count() -> None:
    assert plain_label("very  Good ") == plain_label("very good")


@pytest.mark.parametrize(
    ("answers", "are_labels"),
    [
        (["yes", "no", "yes", "no"], True),
        (["yes", "Yes"], False),  # as many answers as rows
        ([*["yes"] * 9, "y" * 65], False),
        ([*map(str, range(201))] * 3, False),
        ([*map(str, range(200))] * 3, True),
        ([], False),
    ],
)
def test_only_short_repeated_answers_are_labels(answers: list[str], are_labels: bool) -> None:
    assert labels(*answers) == (dict(Counter(answers)) if are_labels else {})


def test_the_last_answer_of_a_row_is_its_label() -> None:
    counter = LabelCounter()
    for _ in range(2):
        counter.add(row("hm", "yes"))
        counter.add(Conversation([Message("user", "a", train=False)]))
    assert counter.labels() == {"yes": 2}


@pytest.mark.parametrize(
    ("held_out", "number"),
    [
        ({"yes": 1, "no": 1}, 0),
        ({"Yes": 2, "no": 1}, 2),  # as training writes it only once
        ({"yes": 3, "YES": 1}, 1),
        ({}, 0),
    ],
)
def test_evaluation_rows_are_compared_with_training_rows(
    held_out: dict[str, int], number: int
) -> None:
    found = find_label_variants(held_out, {"yes": 9, "no": 9})
    assert (found.count if found else 0) == number


def test_labels_of_more_evaluation_rows_than_training_rows_are_compared() -> None:
    found = find_label_variants({"Yes": 50, "no": 50}, {"yes": 9, "no": 9})
    assert found is not None
    assert (found.count, found.named) == (50, ("'Yes' (50), 'yes' (9)",))


def test_preview_and_train_name_both_with_the_way_out(
    tiny_recipe: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = ["text,label", *(f"a{i},positive" for i in range(6)), "b,positive ", "c,Positive"]
    lines += [f"d{i},negative" for i in range(4)]
    path = tmp_path / "reviews.csv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    written = {"type": "template", "user": "{{ text }}", "assistant": "{{ label }}"}
    source = {"path": str(path), "format": written}
    recipe = tiny_recipe(data={"train": source, "evaluation": None, "max_length": 512})
    named = "'positive' (6), 'positive ' (1), 'Positive' (1)"
    text = preview(recipe).text(0, colour=False)
    way_out = f'{WAY_OUT}; data.train.format.assistant: "{{{{ label | trim }}}}" removes the blanks'
    assert f"only in blanks or case  2 of 12 (16.67%)\n  {named}\n  {way_out}" in text
    tokenizer = recipe.model.load_tokenizer()
    training = read_data("training", recipe.data, recipe.data.train_sources, tokenizer)
    check_data(recipe.data, training, None, tokenizer)
    assert f"2 of 12 (16.67%), {named}, {way_out}" in caplog.text
    assert "labels" not in training.record()
    trimmed = {**source, "format": {**written, "assistant": "{{ label | trim }}"}}
    text = preview(tiny_recipe(data={"train": trimmed, "evaluation": None})).text(0, colour=False)
    assert f"'positive' (7), 'Positive' (1)\n  {WAY_OUT}\n" in f"{text}\n"
