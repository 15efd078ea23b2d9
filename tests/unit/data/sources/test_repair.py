"""Repairs change what they name, count it, and leave everything else as it is."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any, get_args

import pytest

from qlora_cli.data.config import Data
from qlora_cli.data.formats import Messages
from qlora_cli.data.sources import BadRows, Source
from qlora_cli.data.sources.repair import Repair, RepairSearch, repaired
from qlora_cli.errors import DataError
from qlora_cli.types import Row

ALL: tuple[Repair, ...] = get_args(Repair)


def turns(*pairs: tuple[str, Any], **more: Any) -> list[Row]:
    return [{"role": role, "content": content, **more} for role, content in pairs]


def shared(*pairs: tuple[str, str]) -> list[Row]:
    return [{"from": role, "value": value} for role, value in pairs]


U, A, S = ("user", "a"), ("assistant", "b"), ("system", "s")
GOOD = turns(U, A)
CASES: dict[str, tuple[Repair, Any, Any]] = {
    "JSON text": ("parse_json_strings", json.dumps(GOOD), GOOD),
    "JSON text with white space": ("parse_json_strings", f"\n {json.dumps(GOOD, indent=1)}", GOOD),
    "JSON text of ShareGPT": ("parse_json_strings", json.dumps(shared(U, A)), shared(U, A)),
    "a capital": ("role_names", turns(("User", "a"), ("ASSISTANT ", "b")), GOOD),
    "other names": ("role_names", turns(("human", "a"), ("bot", "b")), GOOD),
    "model": ("role_names", turns(U, ("model", "b")), GOOD),
    "ShareGPT": ("role_names", shared(("Human", "a"), ("chatgpt", "b")), shared(U, A)),
    "questions": (
        "merge_same_role",
        turns(S, U, ("user", "c"), A),
        turns(S, ("user", "a\n\nc"), A),
    ),
    "answers": ("merge_same_role", turns(U, A, A, A), turns(U, ("assistant", "b\n\nb\n\nb"))),
    "systems": ("merge_same_role", turns(S, S, U, A), turns(("system", "s\n\ns"), U, A)),
    "ShareGPT twice": (
        "merge_same_role",
        shared(("human", "a"), ("human", "c"), ("gpt", "b")),
        shared(("human", "a\n\nc"), ("gpt", "b")),
    ),
    "a last question": ("drop_trailing_user", turns(U, A, U), GOOD),
    "two last questions": (
        "drop_trailing_user",
        [*turns(U, A), *turns(U, date="today"), *turns(U)],
        GOOD,
    ),
    "ShareGPT at the end": (
        "drop_trailing_user",
        shared(("human", "a"), ("gpt", "b"), ("human", "c")),
        shared(("human", "a"), ("gpt", "b")),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_repair_changes_what_it_names_and_nothing_without_it(case: str) -> None:
    repair, given, wanted = CASES[case]
    row = {"id": 7, "messages": given, "note": "[x"}
    counts: Counter[str] = Counter()
    assert repaired(row, [repair], counts) == {**row, "messages": wanted}
    assert counts == {repair: 1}
    assert row["messages"] == given
    others = [one for one in ALL if one != repair]
    counts.clear()
    assert repaired(row, others, counts) == row
    assert not counts


UNTOUCHED: dict[str, Any] = {
    "good turns": GOOD,
    "a text": "[user] hello",
    "JSON text of something else": "[1, 2]",
    "an object in JSON": '{"role": "user"}',
    "broken JSON": '[{"role": "user"',
    "a list of texts": ["user", "user"],
    "an empty list": [],
    "null": None,
    "answers of two tools": turns(U, ("tool", "1"), ("tool", "2")),
    "marked turns": turns(U, A, A, train=False),
    "calls": [*turns(U), *turns(A, A, tool_calls=[{"name": "f"}])],
    "parts": turns(("user", [{"type": "text", "text": "a"}]), ("user", "b")),
    "an unknown role": turns(("narrator", "a"), A),
    # A wrong type is what is tested.
    "a role that is a list": turns((["user"], "a"), A),  # type: ignore[arg-type]
    "ShareGPT's own names": shared(("human", "a"), ("function_call", "{}"), ("gpt", "b")),
}


@pytest.mark.parametrize("case", UNTOUCHED)
def test_repairs_leave_everything_else_as_it_is(case: str) -> None:
    row = {"messages": UNTOUCHED[case]}
    counts: Counter[str] = Counter()
    repairs = [one for one in ALL if case != "parts" or one != "drop_trailing_user"]
    assert repaired(row, repairs, counts) == row
    assert not counts


BY_HAND = "; make them one message in the data, or add the message that is missing between them"
NOT_JOINED: dict[str, tuple[list[Row], str]] = {
    "calls": (
        [*turns(U, A), {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {}}]}],
        "because the second has 'tool_calls'",
    ),
    "reasoning": (
        [*turns(U), *turns(A, reasoning="x"), *turns(A)],
        "because the first has 'reasoning'",
    ),
    "a mark": ([*turns(U, A), *turns(A, train=False)], "because the second has 'train'"),
    "a name": (
        [*turns(U, name="Ann"), *turns(U, A)],
        "because the first has 'name'",
    ),
    "parts": (
        turns(("user", [{"type": "text", "text": "a"}]), U, A),
        r"because the first has content \[.*\(list\), not text",
    ),
    "ShareGPT's calls": (
        shared(U, ("gpt", "b"), ("function_call", '{"name": "f", "arguments": {}}')),
        "because their roles are written 'gpt' and 'function_call'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("repair", [[], ["merge_same_role"]], ids=str)
@pytest.mark.parametrize("case", NOT_JOINED)
def test_a_refusal_says_why_two_messages_were_not_joined(
    tmp_path: Path, case: str, repair: list[Repair]
) -> None:
    given, reason = NOT_JOINED[case]
    path = tmp_path / "train.jsonl"
    format = {"type": "sharegpt" if "from" in given[0] else "messages"}
    rows: list[Row] = [
        {"messages": given},
        {"messages": shared(U, A) if "from" in given[0] else GOOD},
    ]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    data = Data.model_validate(
        {"train": {"path": str(path), "format": {**format, "field": "messages"}}, "repair": repair}
    )
    [source], bad = data.train_sources, BadRows()
    assert len(list(source.conversations(bad))) == 1
    wanted = f"in a row; merge_same_role does not join them, {reason}{BY_HAND}"
    assert re.search(wanted, bad.first[0])


def test_messages_of_two_columns_are_not_joined(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    row = {"prompt": turns(U, A), "completion": "c"}
    good = {"prompt": "a", "completion": "b"}
    path.write_text(f"{json.dumps(row)}\n{json.dumps(good)}\n", encoding="utf-8")
    train = {"path": str(path), "format": {"type": "prompt_completion"}}
    for repair in ([], ["merge_same_role"]):
        [source], bad = (
            Data.model_validate({"train": train, "repair": repair}).train_sources,
            BadRows(),
        )
        assert len(list(source.conversations(bad))) == 1
        assert ("joins only messages of one column" in bad.first[0]) is bool(repair)


@pytest.mark.parametrize("empty", [None, [], "", {}])
def test_empty_keys_do_not_keep_messages_apart(empty: Any) -> None:
    row = {"messages": turns(U, A, A, tool_calls=empty)}
    found = repaired(row, ["merge_same_role"], Counter())
    assert [turn["content"] for turn in found["messages"]] == ["a", "b\n\nb"]


@pytest.mark.parametrize("share", [None, 0.5])
def test_repairs_of_a_source_are_counted_once(tmp_path: Path, share: float | None) -> None:
    path = tmp_path / "train.jsonl"
    rows: list[Row] = [{"messages": turns(U, ("Assistant", f"{i}"), U)} for i in range(20)]
    rows += [{"messages": turns(U, ("assistant", f"good {i}"))} for i in range(5)]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    data = Data.model_validate(
        {"train": {"path": str(path)}, "evaluation_share": share, "repair": list(ALL)}
    )
    counts: Counter[str] = Counter()
    found = 0
    for source in [*data.train_sources, *data.evaluation_sources]:
        bad = BadRows()
        found += len(list(source.conversations(bad)))
        assert bad.count == 0
        counts += bad.repaired
    assert found == 25
    assert counts == {"role_names": 20, "drop_trailing_user": 20}


def bad_rows(kind: str, number: int) -> list[Row]:
    turns: dict[str, list[tuple[str, str]]] = {
        "two of one role": [("user", "a"), ("user", "b"), ("assistant", "c")],
        "a last question": [("user", "a"), ("assistant", "b"), ("user", "c")],
        "all": [("Human", "a"), ("Human", "b"), ("Bot", "c"), ("Human", "d")],
        "none help": [("user", "a"), ("user", "b"), ("assistant", "")],
        "nothing to repair": [("user", "a"), ("assistant", "")],
    }
    return [
        {
            "messages": [
                {"role": role, "content": text and f"{text}{i}"} for role, text in turns[kind]
            ]
        }
        for i in range(number)
    ]


@pytest.mark.parametrize(
    ("kind", "most"),
    [
        ("two of one role", 1),
        ("a last question", 1),
        ("all", 1),
        ("none help", 1),
        ("nothing to repair", 0),
    ],
)
def test_a_bad_row_is_read_once_more_at_most_to_try_repairs(kind: str, most: int) -> None:
    rows = bad_rows(kind, 50)
    tried: list[Row] = []

    def is_usable(row: Row) -> bool:
        tried.append(row)
        try:
            Messages().to_conversation(row)
        except DataError:
            return False
        return True

    search = RepairSearch(is_usable)
    found = {search.helpful(row) for row in rows}
    assert len(found) == 1
    assert len(tried) <= most * len(rows) + 8  # of the first row, more are tried


@pytest.mark.parametrize("is_first_usable", [True, False])
def test_repairs_are_not_tried_where_no_error_names_them(
    tmp_path: Path, is_first_usable: bool
) -> None:
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    rows = bad_rows("two of one role", 3)
    path = tmp_path / "a.jsonl"
    ordered = [good, *rows] if is_first_usable else [*rows, good]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in ordered), encoding="utf-8")
    bad = BadRows(tries_repairs=False)
    assert len(list(Source(path=str(path)).conversations(bad))) == 1
    named = "data.repair: [merge_same_role]" in bad.remedy("leave {them} out")
    assert named is not is_first_usable
