"""Checks of the section `data` as a whole."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from qlora_cli.data.config import Data
from qlora_cli.data.formats import Preference
from qlora_cli.data.sources import Source
from qlora_cli.errors import DataError
from qlora_cli.recipe.schema import Recipe
from qlora_cli.train.train import train


def test_preference_data_is_not_trained_on_yet(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(Preference.example), encoding="utf-8")
    pairs, plain = Source(path=str(path), format=Preference()), Source(path="rows.jsonl")
    Data(train=plain).refuse_untrainable()
    reason = "pairs.jsonl: preference data can be previewed, but not yet trained on"
    for data in (Data(train=[plain, pairs]), Data(train=plain, evaluation=pairs)):
        with pytest.raises(DataError, match=reason):
            data.refuse_untrainable()
    recipe = Recipe.model_validate(
        {
            "model": {"path": "missing"},
            "data": {"train": {"path": str(path), "format": {"type": "preference"}}},
            "training": {"max_steps": 1},
            "output": {"dir": str(tmp_path / "run")},
        }
    )
    with pytest.raises(DataError, match=reason):
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
        Data(train=pairs).refuse_untrainable()
    hint = str(caught.value.hint)
    settings = yaml.safe_load(hint[hint.index("{") :])
    source = Source.model_validate({"path": str(path), "format": settings})
    wanted = pairs.format.to_conversation(row)
    assert source.format.to_conversation(row) == replace(wanted, rejected=None)


def test_preferences_that_cannot_be_read_are_sent_to_the_preview(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text("{}\n", encoding="utf-8")
    with pytest.raises(DataError) as caught:
        Data(train=Source(path=str(path), format=Preference())).refuse_untrainable()
    assert str(caught.value.hint).startswith("qlora preview")
