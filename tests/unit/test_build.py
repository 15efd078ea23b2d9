"""What the stories build in the same way."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_cli.build import read_data


def test_the_log_says_which_data_was_prepared_before(
    tiny_recipe: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    recipe = tiny_recipe()
    tokenizer = recipe.model.load_tokenizer()
    caplog.set_level(logging.INFO, "qlora")

    def lines(recipe: Any, **settings: bool) -> list[str]:
        caplog.clear()
        read_data("training", recipe.data, recipe.data.train_sources, tokenizer, **settings)
        return [message.split(":")[0] for message in caplog.messages]

    assert lines(recipe) == ["training data"]
    again = tiny_recipe(optimizer={"learning_rate": 1e-3}, output={"dir": str(tmp_path / "other")})
    assert lines(again) == ["training data (as prepared before)"]
    assert lines(again, use_cache=False) == ["training data"]
