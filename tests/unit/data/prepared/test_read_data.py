"""Read prepared data, and audit it."""

from __future__ import annotations

import gzip
import json
import logging
import random
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from qlora_cli.data.prepared.audit import audit_data
from qlora_cli.data.prepared.cache import read_data
from qlora_cli.data.sources import BadRows
from qlora_cli.errors import DataError


def test_the_log_marks_data_from_the_cache(
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


@pytest.mark.parametrize("limit", [None, 40])
def test_the_drift_check_does_not_reread_shuffled_rows(
    tiny_recipe: Callable[..., Any], tmp_path: Path, limit: int | None
) -> None:
    draw = random.Random(0)
    path = tmp_path / "many.jsonl.gz"
    rows = [
        {"question": f"{i} {draw.random()}", "answer": f"{draw.random()}" * (1 + 8 * (i % 7 == 0))}
        for i in range(3000)
    ]
    path.write_bytes(gzip.compress("".join(f"{json.dumps(row)}\n" for row in rows).encode()))
    form = {
        "type": "prompt_completion", "prompt_field": "question", "completion_field": "answer",
    }  # fmt: skip
    source = {"path": str(path), "format": form, "shuffle": True, "limit": limit}
    recipe = tiny_recipe(data={"train": source, "evaluation": None, "max_lost": 1})
    tokenizer = recipe.model.load_tokenizer()
    training = read_data("training", recipe.data, recipe.data.train_sources, tokenizer)
    if limit is None:
        # From now on, reading the file to its end is an error.
        path.write_bytes(path.read_bytes()[:-2000])
    [side] = audit_data(recipe.data, training, None, tokenizer)
    [drift] = [
        one for one in side.findings if one.what == "rows whose prompt differs in generation"
    ]
    # Every seventh of the 256 (or 40) rows is truncated.
    assert drift.count == 0
    assert drift.total == pytest.approx(6 / 7 * (limit or 256), abs=6)
    with pytest.raises(DataError, match="cut short") if limit is None else nullcontext():
        assert len(list(recipe.data.train_sources[0].read(BadRows()))) == limit
