"""`qlora preview`: every bad row in a file, and what was repaired."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_cli.errors import DataError, RecipeError
from qlora_cli.inspect.bad_rows import write_bad_rows
from qlora_cli.inspect.preview import preview

USER, ANSWER = {"role": "user", "content": "say ab"}, {"role": "assistant", "content": "ab"}


def written(path: Path, *lines: object) -> Path:
    texts = [line if isinstance(line, str) else json.dumps({"messages": line}) for line in lines]
    path.write_text("\n".join(texts), encoding="utf-8")
    return path


def test_every_bad_row_is_written_with_its_reason(
    tiny_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    good, bad = [USER, ANSWER], [USER, USER, ANSWER]
    train = written(
        tmp_path / "train.jsonl", good, *[bad] * 14, "{", [USER, {**ANSWER, "content": ""}]
    )
    held_out = written(tmp_path / "held.jsonl", [USER])
    recipe = tiny_recipe(
        data={"train": {"path": str(train)}, "evaluation": {"path": str(held_out)}}
    )
    path = tmp_path / "bad.jsonl"
    assert write_bad_rows(recipe, path) == 17
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [row["row"] for row in rows] == [
        *(f"{train}:{i}" for i in range(2, 18)),
        f"{held_out}:1",
    ]
    assert rows[0]["reason"] == "field 'messages[1]': two messages of role user in a row"
    assert all(row.keys() == {"row", "reason"} and row["reason"] for row in rows)
    with pytest.raises(DataError, match="16 bad rows\n  14 x field messages"):
        preview(recipe)


def test_a_file_that_cannot_be_written_is_an_error(
    tiny_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=r"--bad-rows: .*cannot be written"):
        write_bad_rows(tiny_recipe(), tmp_path / "nowhere" / "bad.jsonl")


def test_repairs_are_counted_in_the_preview(
    tiny_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    train = written(
        tmp_path / "train.jsonl",
        [USER, ANSWER],
        [USER, ANSWER, USER],
        [USER, USER, ANSWER, USER],
        json.dumps({"messages": json.dumps([{**USER, "role": "Human"}, ANSWER])}),
    )
    repairs = ["parse_json_strings", "role_names", "merge_same_role", "drop_trailing_user"]
    settings = {"train": {"path": str(train)}, "evaluation": None, "max_lost": 1}
    text = preview(tiny_recipe(data={**settings, "repair": repairs})).text(3, colour=False)
    line = next(line for line in text.splitlines() if line.startswith("rows repaired: "))
    assert sorted(line.removeprefix("rows repaired: ").split(", ")) == [
        "drop_trailing_user (2)",
        "merge_same_role (1)",
        "parse_json_strings (1)",
        "role_names (1)",
    ]
    assert write_bad_rows(tiny_recipe(data={**settings, "repair": repairs}), tmp_path / "b") == 0
    assert write_bad_rows(tiny_recipe(data=settings), tmp_path / "b") == 3
