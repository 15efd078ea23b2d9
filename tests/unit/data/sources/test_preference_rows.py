"""Preference rows that a supervised format is asked to read are refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from qlora_cli.data.formats import Alpaca, Messages, PromptCompletion, ShareGpt, TemplateFormat
from qlora_cli.data.sources import BadRows, Source
from qlora_cli.errors import DataError

USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
PAIR = {"chosen": "b", "rejected": "c"}
KTO = {"prompt": "a", "completion": "b"}


def source(tmp_path: Path, row: dict[str, Any], **settings: Any) -> Source:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    return Source(path=str(path), **settings)


@pytest.mark.parametrize("format", [Messages(), ShareGpt(), Alpaca(), PromptCompletion()])
@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a", **PAIR},
        {"prompt": [USER], "chosen": [ANSWER], "rejected": [ANSWER]},
        {"chosen": [USER, ANSWER], "rejected": [USER, ANSWER]},
        {"system": "s", "question": "a", **PAIR},
        {"instruction": "a", **PAIR},
        {**KTO, "label": True},
        {**KTO, "label": 0},
        {**KTO, "label": "False"},
        {"prompt": [USER], "completion": [ANSWER], "label": False},
    ],
)
def test_a_preference_row_is_named(tmp_path: Path, row: dict[str, Any], format: Any) -> None:
    rows = source(tmp_path, row, format=format)
    with pytest.raises(DataError, match=r"rows\.jsonl:1: a preference row .*not available") as why:
        list(rows.conversations(BadRows()))
    hint = str(why.value.hint)
    settings = yaml.safe_load(hint[hint.index("{") :])
    if "label" in row:
        way_out = source(tmp_path, row, format=PromptCompletion(), fields=settings)
    else:
        way_out = Source.model_validate({"path": rows.path, "format": settings})
    [found] = way_out.conversations(BadRows())
    assert found.messages[-1].content == "b"


@pytest.mark.parametrize(
    ("row", "format"),
    [
        ({"prompt": "a", **PAIR}, PromptCompletion(completion_field="chosen")),
        ({"messages": [USER, ANSWER], **PAIR}, Messages()),
        ({**KTO, "label": "sports"}, PromptCompletion()),
        ({**KTO, "label": 7}, PromptCompletion()),
        ({**KTO, "label": True, "text": "t"}, TemplateFormat(user="{{ text }}", assistant="x")),
    ],
)
def test_other_rows_are_read(tmp_path: Path, row: dict[str, Any], format: Any) -> None:
    assert len(list(source(tmp_path, row, format=format).conversations(BadRows()))) == 1
