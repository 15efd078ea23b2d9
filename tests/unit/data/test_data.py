"""Checks of the section `data` as a whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora_cli.data import Data
from qlora_cli.data.formats import Preference
from qlora_cli.data.sources import Source
from qlora_cli.errors import DataError
from qlora_cli.recipe import Recipe
from qlora_cli.train import train


def test_preference_data_is_not_trained_on_yet(tmp_path: Path) -> None:
    pairs, plain = Source(path="pairs.jsonl", format=Preference()), Source(path="rows.jsonl")
    Data(train=plain).refuse_untrainable()
    reason = "^pairs.jsonl: preference data is read and previewed, not trained on yet"
    for data in (Data(train=[plain, pairs]), Data(train=plain, evaluation=pairs)):
        with pytest.raises(DataError, match=reason):
            data.refuse_untrainable()
    recipe = Recipe.model_validate(
        {
            "model": {"path": "missing"},
            "data": {"train": {"path": "pairs.jsonl", "format": {"type": "preference"}}},
            "training": {"max_steps": 1},
            "output": {"dir": str(tmp_path / "run")},
        }
    )
    with pytest.raises(DataError, match=reason):
        train(recipe)
    assert not (tmp_path / "run").exists()
