"""Rows of another kind than their format reads are refused by name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from qlora_cli.data.formats import (
    Alpaca,
    Feedback,
    Labelled,
    Messages,
    Preference,
    PromptCompletion,
    ShareGpt,
    TemplateFormat,
)
from qlora_cli.data.sources import BadRows, Portion, Source
from qlora_cli.errors import DataError

USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
WORSE = {**ANSWER, "content": "c"}
PAIR = {"chosen": "b", "rejected": "c"}
KTO = {"prompt": "a", "completion": "b"}


def source(tmp_path: Path, row: dict[str, Any], **settings: Any) -> Source:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    return Source(path=str(path), **settings)


def written(hint: str, after: str) -> Any:
    """Return the settings that a hint writes after some words."""
    found = re.search(rf"{after} (\{{.*?\}})", hint)
    assert found is not None
    return yaml.safe_load(found[1])


@pytest.mark.parametrize("format", [Messages(), ShareGpt(), Alpaca(), PromptCompletion()])
@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a", **PAIR},
        {"prompt": [USER], "chosen": [ANSWER], "rejected": [WORSE]},
        {"chosen": [USER, ANSWER], "rejected": [USER, WORSE]},
        {"system": "s", "question": "a", **PAIR},
        {"instruction": "a", **PAIR},
        {"prompt": "a", "chosen": [USER, ANSWER], "rejected": [USER, WORSE]},
    ],
)
def test_a_pair_is_named_with_the_settings_that_read_it(
    tmp_path: Path, row: dict[str, Any], format: Any
) -> None:
    rows = source(tmp_path, row, format=format)
    reason = r"rows\.jsonl:1: a preference row \('chosen' and 'rejected'\); format .* reads one ans"
    with pytest.raises(DataError, match=reason) as why:
        list(rows.conversations(BadRows()))
    hint = str(why.value.hint)
    assert "the recipe objective: {type: dpo}" in hint
    for after in ("both answers, give this source format:", "alone, give this source format:"):
        settings = {"path": rows.path, "format": written(hint, after)}
        [found] = Source.model_validate(settings).conversations(BadRows())
        assert found.messages[-1].content == "b"
        assert (found.rejected is not None) is ("both" in after)


def test_the_chosen_answers_alone_are_not_proposed_without_the_input(tmp_path: Path) -> None:
    rows = source(tmp_path, {"instruction": "a", "input": "x", **PAIR})
    with pytest.raises(DataError, match="a preference row") as why:
        list(rows.conversations(BadRows()))
    hint = str(why.value.hint)
    assert "{type: preference, prompt_field: instruction}" in hint
    assert "alone" not in hint


@pytest.mark.parametrize("format", [Messages(), ShareGpt(), Alpaca(), PromptCompletion()])
@pytest.mark.parametrize(
    "row",
    [
        {**KTO, "label": True},
        {**KTO, "label": 0},
        {**KTO, "label": "False"},
        {"prompt": [USER], "completion": [ANSWER], "label": False},
    ],
)
def test_feedback_is_named_with_the_settings_that_read_it(
    tmp_path: Path, row: dict[str, Any], format: Any
) -> None:
    rows = source(tmp_path, row, format=format)
    with pytest.raises(DataError, match=r"rows\.jsonl:1: a row of feedback \('prompt'") as why:
        list(rows.conversations(BadRows()))
    hint = str(why.value.hint)
    assert "the recipe objective: {type: kto}" in hint
    settings = {"path": rows.path, "format": written(hint, "answers, give this source format:")}
    [judged] = Source.model_validate(settings).conversations(BadRows())
    assert isinstance(judged.label, bool)
    renamed = source(tmp_path, row, format=PromptCompletion(), fields=written(hint, "fields:"))
    [found] = renamed.conversations(BadRows())
    assert found.messages[-1].content == "b"


@pytest.mark.parametrize(
    ("row", "format", "said"),
    [
        ({**KTO, "label": True}, Preference(), "a row of feedback .* reads two answers"),
        ({"prompt": "a", **PAIR}, Feedback(), "a preference row .* reads one answer and whether"),
        ({"prompt": "a", **PAIR}, Labelled(), "a preference row .* reads a text and its label"),
        ({**KTO, "label": True}, Labelled(), "a row of feedback .* reads a text and its label"),
    ],
)
def test_rows_of_another_comparison_are_named_without_a_way_to_plain_answers(
    tmp_path: Path, row: dict[str, Any], format: Any, said: str
) -> None:
    with pytest.raises(DataError, match=said) as why:
        list(source(tmp_path, row, format=format).conversations(BadRows()))
    assert "alone" not in str(why.value.hint)


@pytest.mark.parametrize("format", [Preference(), Feedback(), Labelled()])
def test_plain_rows_are_bad_rows_of_a_format_that_compares(tmp_path: Path, format: Any) -> None:
    for row in ({"messages": [USER, ANSWER]}, KTO, {"text": "a"}):
        with pytest.raises(DataError, match=r"1 bad row\n.*field '\w+': missing") as why:
            list(source(tmp_path, row, format=format).conversations(BadRows()))
        hint = str(why.value.hint)
        assert "no row has that field" in hint
        assert "plain answers are for objective: {type: supervised}" in hint
        assert "type: template" not in hint


def test_a_text_of_a_labelled_row_in_another_column_is_proposed(tmp_path: Path) -> None:
    rows = source(tmp_path, {"label": "a", "sentence": "b"}, format=Labelled())
    with pytest.raises(DataError, match="field 'text': missing; found 'label', 'sentence'") as why:
        list(rows.conversations(BadRows()))
    found = re.search(r"data.train.format: (\{.*\}\"\})", str(why.value.hint))
    assert found is not None
    settings = yaml.safe_load(found[1])
    found = Source.model_validate({"path": rows.path, "format": settings})
    [read] = found.conversations(BadRows())
    assert read.messages[0].content == "b"


@pytest.mark.parametrize(
    ("row", "format"),
    [
        ({"prompt": "2 + 2", "chosen": 4, "rejected": 5}, Preference()),
        ({"prompt": "2 + 2", "completion": 4, "label": True}, Feedback()),
    ],
)
def test_no_template_is_proposed_for_numbers_in_rows_that_compare(
    tmp_path: Path, row: dict[str, Any], format: Any
) -> None:
    with pytest.raises(DataError, match=r"got 4 \(int\), expected ") as why:
        list(source(tmp_path, row, format=format).conversations(BadRows()))
    assert "template" not in str(why.value.hint)


@pytest.mark.parametrize("kind", ["preference", "feedback", "labelled"])
@pytest.mark.parametrize("setting", [{"learn_prompt": True}, {"learn_roles": ["user"]}])
def test_what_is_supervised_is_not_chosen_for_rows_that_compare(
    kind: str, setting: dict[str, Any]
) -> None:
    with pytest.raises(ValidationError, match=f"format {kind} trains on is decided by the obj"):
        Source.model_validate({"path": "a.jsonl", "format": {"type": kind}, **setting})


@pytest.mark.parametrize(
    ("format", "rows"),
    [
        (Preference(), [{"prompt": "a", "chosen": str(i), "rejected": "c"} for i in range(9)]),
        (Feedback(), [{**KTO, "completion": str(i), "label": i % 2} for i in range(9)]),
        (Labelled(), [{"text": "a", "label": i} for i in range(9)]),
    ],
)
def test_a_prompt_is_either_trained_on_or_held_out(
    tmp_path: Path, format: Any, rows: list[dict[str, Any]]
) -> None:
    path = tmp_path / "rows.jsonl"
    for seed in range(8):
        prompts = ["a", "b", "c", "d"]
        field = "text" if isinstance(format, Labelled) else "prompt"
        lines = [json.dumps({**row, field: prompt}) for row in rows for prompt in prompts]
        path.write_text("\n".join(lines), encoding="utf-8")
        sides = [
            Portion.of(
                Source(path=str(path), format=format), seed=seed, share=0.5, held_out=held_out
            )
            for held_out in (False, True)
        ]
        found = [[located.row[field] for located in side.read(BadRows())] for side in sides]
        assert not {*found[0]} & {*found[1]}
        assert len(found[0]) + len(found[1]) == len(lines)


@pytest.mark.parametrize(
    ("row", "format"),
    [
        ({"prompt": "a", **PAIR}, PromptCompletion(completion_field="chosen")),
        ({"messages": [USER, ANSWER], **PAIR}, Messages()),
        ({**KTO, "label": "sports"}, PromptCompletion()),
        ({**KTO, "label": 7}, PromptCompletion()),
        ({**KTO, "label": True, "text": "t"}, TemplateFormat(user="{{ text }}", assistant="x")),
        ({**KTO, "label": True}, Labelled(field="prompt")),
        ({**KTO, "label": True, "text": "t"}, Labelled(field="text")),
    ],
)
def test_other_rows_are_read(tmp_path: Path, row: dict[str, Any], format: Any) -> None:
    assert len(list(source(tmp_path, row, format=format).conversations(BadRows()))) == 1
