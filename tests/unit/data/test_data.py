"""Checks of the section `data` as a whole."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from qlora_cli.data.config import Data
from qlora_cli.data.formats import Feedback, Labelled, Messages, Preference
from qlora_cli.data.sources import Source
from qlora_cli.errors import DataError
from qlora_cli.objectives import SUPERVISED
from qlora_cli.objectives.preference_settings import DPO, KTO
from qlora_cli.recipe.schema import Recipe
from qlora_cli.train.train import train

FORMATS = {
    "answers": Messages(),
    "pairs": Preference(),
    "feedback": Feedback(),
    "labels": Labelled(),
}
OBJECTIVES = {"answers": SUPERVISED, "pairs": DPO(), "feedback": KTO()}


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("needed", OBJECTIVES)
def test_a_source_holds_the_rows_that_the_objective_needs(
    tmp_path: Path, kind: str, needed: str
) -> None:
    path, objective = tmp_path / "rows.jsonl", OBJECTIVES[needed]
    path.write_text(json.dumps(FORMATS[kind].example), encoding="utf-8")
    right = Source(path="rows.jsonl", format=FORMATS[needed])
    found = Source(path=str(path), format=FORMATS[kind])
    Data(train=right).require_rows(objective)
    sides = (Data(train=[right, found]), Data(train=right, evaluation=found))
    if kind == needed:
        for data in sides:
            data.require_rows(objective)
        return
    reason = rf"format.type \({found.format.type}\) reads .*\({objective.type}\) learns from"
    for data in sides:
        with pytest.raises(DataError, match=reason) as why:
            data.require_rows(objective)
        assert "objective: {type: " in str(why.value.hint)


def test_train_refuses_other_rows_before_it_creates_a_run(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(Preference.example), encoding="utf-8")
    recipe = Recipe.model_validate(
        {
            "model": {"path": "missing"},
            "data": {"train": {"path": str(path), "format": {"type": "preference"}}},
            "training": {"max_steps": 1},
            "output": {"dir": str(tmp_path / "run")},
        }
    )
    with pytest.raises(DataError, match=r"pairs.jsonl: format.type \(preference\) reads pairs"):
        train(recipe)
    assert not (tmp_path / "run").exists()


USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
HUMAN, GPT = {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}


@pytest.mark.parametrize(
    ("prompt", "chosen"),
    [
        ({"prompt": "a"}, "b"),
        ({"prompt": "a"}, [ANSWER]),
        ({"prompt": [USER]}, "b"),
        ({"conversations": [HUMAN]}, GPT),
        ({"conversations": [HUMAN]}, [GPT]),
        ({"messages": [USER]}, ANSWER),
        ({}, [USER, ANSWER]),
        ({}, [HUMAN, GPT]),
    ],
)
def test_the_hint_for_preferences_reads_the_row_at_hand(
    tmp_path: Path, prompt: dict[str, Any], chosen: Any
) -> None:
    path = tmp_path / "pairs.jsonl"
    row = {**prompt, "better": chosen, "rejected": chosen}
    path.write_text("{}\n" + json.dumps(row), encoding="utf-8")
    pairs = Source(path=str(path), format=Preference(chosen_field="better"))
    with pytest.raises(DataError) as caught:
        Data(train=pairs).require_rows(SUPERVISED)
    hint = str(caught.value.hint)
    found = re.search(r"this source format: (\{.*?\})", hint)
    assert found is not None
    settings = yaml.safe_load(found[1])
    source = Source.model_validate({"path": str(path), "format": settings})
    wanted = pairs.format.to_conversation(row)
    assert source.format.to_conversation(row) == replace(wanted, rejected=None)


def test_preferences_that_cannot_be_read_are_sent_to_the_preview(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text("{}\n", encoding="utf-8")
    with pytest.raises(DataError) as caught:
        Data(train=Source(path=str(path), format=Preference())).require_rows(SUPERVISED)
    assert "qlora preview shows what is wrong with its rows" in str(caught.value.hint)
