"""`qlora preview`: every bad row in a file, and what was repaired."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_cli.errors import DataError, RecipeError
from qlora_cli.inspect.bad_rows import write_bad_rows
from qlora_cli.inspect.preview import preview

TOOLS = [{"name": "add", "parameters": {"type": "object", "properties": {}}}]
CALL = {"role": "assistant", "tool_calls": [{"name": "add", "arguments": {"a": 1}}]}
RESULT = {"role": "tool", "content": "7431"}
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


@pytest.mark.parametrize(
    "settings",
    [{"evaluation_share": 0.5}, {"evaluation_share": 0.5, "seed": 3}, {"evaluation": "same"}],
)
def test_each_bad_row_of_a_file_is_written_once_in_its_order(
    tiny_recipe: Callable[..., Any], tmp_path: Path, settings: dict[str, Any]
) -> None:
    rows = [[USER, {**ANSWER, "content": f"b{i}"}] for i in range(12)]
    rows[2:12:2] = [[USER], "{", [USER, USER, ANSWER], "[]", [ANSWER]]
    train = written(tmp_path / "train.jsonl", *rows)
    source = {"path": str(train)}
    evaluation = source if "evaluation" in settings else None
    recipe = tiny_recipe(data={"train": source, **settings, "evaluation": evaluation})
    assert write_bad_rows(recipe, tmp_path / "bad.jsonl") == 5
    lines = (tmp_path / "bad.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["row"] for line in lines] == [f"{train}:{i}" for i in range(3, 12, 2)]


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


@pytest.mark.parametrize(
    ("turns", "tools"),
    [([USER, ANSWER], TOOLS), ([USER, CALL], TOOLS), ([USER, CALL], None)],
)
@pytest.mark.parametrize("is_mixed", [False, True])
def test_a_template_without_tools_names_one_that_writes_them(
    tiny_recipe: Callable[..., Any], tmp_path: Path, turns: Any, tools: Any, is_mixed: bool
) -> None:
    dropped = json.dumps({"messages": turns, "tools": tools})
    others = [[USER, ANSWER], [USER, USER, ANSWER]] if is_mixed else []
    train = written(tmp_path / "train.jsonl", *[dropped] * 4, *others)
    settings = {"train": {"path": str(train)}, "evaluation": None}
    with pytest.raises(DataError) as caught:
        preview(tiny_recipe(data=settings))
    way = "data.chat_template: configs/chat_templates/chatml-tools.jinja writes tools and calls"
    hint = str(caught.value.hint)
    assert hint.startswith(f"{way} (4 of 5 rows); data.repair: [merge_same_role] (1" * is_mixed)
    assert hint.startswith(way)
    template = {"chat_template": "configs/chat_templates/chatml-tools.jinja"}
    repair = {"repair": ["merge_same_role"], "max_length": 512}
    recipe = tiny_recipe(data={**settings, **template, **repair})
    assert write_bad_rows(recipe, tmp_path / "bad.jsonl") == 0


def test_repairs_of_rows_that_are_left_out_are_not_counted(
    tiny_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    renamed = {**USER, "role": "Human"}
    train = written(
        tmp_path / "train.jsonl",
        [USER, ANSWER],
        [renamed, ANSWER],
        [renamed, {**ANSWER, "content": ""}],  # cannot be read
        json.dumps({"messages": [renamed, ANSWER], "tools": TOOLS}),  # refused by the template
        [{**renamed, "content": "ab " * 200}, ANSWER],  # too long
    )
    data = {"train": {"path": str(train)}, "evaluation": None, "on_bad_row": "skip"}
    recipe = tiny_recipe(data={**data, "max_lost": 1, "truncate": "drop", "repair": ["role_names"]})
    assert "rows repaired: role_names (1)" in preview(recipe).text(3, colour=False).splitlines()


@pytest.mark.parametrize("share", [0.1, 0.5])
@pytest.mark.parametrize("rest", [[], [CALL]], ids=["not read", "not rendered"])
@pytest.mark.parametrize("has_usable", [False, True])
def test_an_error_without_a_usable_row_counts_what_the_file_has(
    tiny_recipe: Callable[..., Any],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    share: float,
    rest: list[Any],
    has_usable: bool,
) -> None:
    rows = [[{**USER, "content": f"a{i}"}, *rest] for i in range(40)]
    train = written(tmp_path / "train.jsonl", *rows, *[[USER, ANSWER]] * has_usable)
    recipe = tiny_recipe(
        data={"train": {"path": str(train)}, "evaluation": None, "evaluation_share": share}
    )
    with caplog.at_level("INFO", "qlora"):
        assert write_bad_rows(recipe, tmp_path / "bad.jsonl") == 40
    assert caplog.messages == [
        f"{tmp_path / 'bad.jsonl'}: 40 bad rows of all sources, held-out rows included"
    ]
    with pytest.raises(DataError) as caught:
        preview(recipe, use_cache=False)
    # A usable row among the held-out rows only: the error names the rows that it counts.
    whole = f"{train}: 40 bad rows"
    portion = rf"{re.escape(str(train))} \(training rows\): \d+ bad rows"
    said = str(caught.value)
    assert said.startswith(whole) or (has_usable and re.match(portion, said))
