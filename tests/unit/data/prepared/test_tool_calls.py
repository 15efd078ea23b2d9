"""Tool calls that disagree with the tools and the results of their row."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_cli.data.config import Data
from qlora_cli.data.prepared.audit import audit_data
from qlora_cli.data.prepared.cache import read_data
from qlora_cli.data.prepared.tool_calls import (
    INCOMPLETE,
    NO_TOOLS,
    REORDERED,
    REPEATED,
    UNANSWERED,
    UNDECLARED,
    UNKNOWN_CALL,
    WITHOUT_ID,
    ToolCallAudit,
    tool_call_problems,
)
from qlora_cli.data.sources import BadRows, Source
from qlora_cli.inspect.preview import preview
from tests.conftest import make_tokenizer

TEMPLATE = Path("configs/chat_templates/chatml-tools.jinja").read_text(encoding="utf-8")
WRITES = "{{% for message in messages if message.role == 'tool' %}}{{{{ {key} }}}}{{% endfor %}}"
TOKENIZER = make_tokenizer(TEMPLATE)
TOOL = {"name": "add", "parameters": {"type": "object", "required": ["a", "b"]}}
USER: dict[str, Any] = {"role": "user", "content": "2 + 3?"}
ANSWER: dict[str, Any] = {"role": "assistant", "content": "It is 5."}


def asked(name: str = "add", *ids: str | None, **arguments: Any) -> dict[str, Any]:
    calls = [{"id": one, "name": name, "arguments": arguments} for one in ids or (None,)]
    return {"role": "assistant", "tool_calls": calls}


def result(call: str | None = None) -> dict[str, Any]:
    return {"role": "tool", "content": "5", "tool_call_id": call}


def row(*turns: dict[str, Any], tools: Any = (TOOL,)) -> dict[str, Any]:
    return {"messages": [USER, *turns], "tools": tools}


WHOLE = asked("add", a=2, b=3)
PAIR = asked("add", "x", "y", a=2, b=3)
ANSWER_TO_USER: dict[str, Any] = {"role": "user", "content": "And?"}
ROWS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "right": (row(WHOLE), set()),
    "right, with ids": (
        row(asked("add", "x", "y", a=2, b=3), result("x"), result("y"), ANSWER),
        set(),
    ),
    "a result without an id": (row(asked("add", "x", a=2, b=3), result(), ANSWER), {WITHOUT_ID}),
    "no ids at all": (row(asked("add", None, None, a=2, b=3), result(), result(), ANSWER), set()),
    "one of two without an id": (row(PAIR, result("x"), result(), ANSWER), {WITHOUT_ID}),
    "results in another order": (row(PAIR, result("y"), result("x"), ANSWER), {REORDERED}),
    "another order in a later turn": (
        row(asked("add", "z", a=2, b=3), result("z"), PAIR, result("y"), result("x"), ANSWER),
        {REORDERED},
    ),
    "a call without a result": (row(PAIR, result("y"), ANSWER), {UNANSWERED}),
    "no result": (row(asked("add", "x", a=2, b=3), ANSWER_TO_USER, ANSWER), {UNANSWERED}),
    "no result, without ids": (row(WHOLE, ANSWER_TO_USER, ANSWER), {UNANSWERED}),
    "calls in the last turn": (row(PAIR), set()),
    "two results of one call": (
        row(PAIR, result("x"), result("x"), ANSWER),
        {REPEATED, UNANSWERED},
    ),
    "a second result in a later turn": (
        row(
            asked("add", "x", a=2, b=3),
            result("x"),
            asked("add", "y", a=2, b=3),
            result("x"),
            ANSWER,
        ),
        {REPEATED},
    ),
    "an id used again": (
        row(
            asked("add", "x", a=2, b=3),
            result("x"),
            asked("add", "x", a=2, b=3),
            result("x"),
            ANSWER,
        ),
        set(),
    ),
    "tools, but no call": (row(ANSWER), set()),
    "no tools, no call": ({"messages": [USER, ANSWER]}, set()),
    "no column of tools": ({"messages": [USER, WHOLE]}, {NO_TOOLS}),
    "null as tools": (row(WHOLE, tools=None), {NO_TOOLS}),
    "an empty list of tools": (row(WHOLE, tools=[]), {NO_TOOLS}),
    "JSON text of an empty list": (row(WHOLE, tools="[]"), {NO_TOOLS}),
    "an undeclared tool": (row(asked("subtract", a=2, b=3)), {UNDECLARED}),
    "a tool in another case": (row(asked("Add", a=2, b=3)), {UNDECLARED}),
    "a missing argument": (row(asked("add", a=2)), {INCOMPLETE}),
    "no arguments": (row(asked("add")), {INCOMPLETE}),
    "one more argument": (row(asked("add", a=2, b=3, c=4)), set()),
    "a schema without required keys": (
        row(asked("add"), tools=[{"name": "add", "parameters": {"type": "object"}}]),
        set(),
    ),
    "no schema": (row(asked("add"), tools=[{"name": "add"}]), set()),
    "no list of required keys": (
        row(asked("add"), tools=[{"name": "add", "parameters": {"required": True}}]),
        set(),
    ),
    "a schema as text": (row(asked("add"), tools=[{"name": "add", "parameters": "a, b"}]), set()),
    "a result of another call": (
        row(asked("add", "x", a=2, b=3), result("z"), ANSWER),
        {UNKNOWN_CALL},
    ),
    "a result of a later call": (
        row(WHOLE, result("x"), asked("add", "x", a=2, b=3), result("x"), ANSWER),
        {UNKNOWN_CALL},
    ),
    "a result of a call without an id": (row(WHOLE, result("x"), ANSWER), {UNKNOWN_CALL}),
    "several problems": (
        row(asked("add", "x", a=2), result("y"), asked("subtract"), result(), ANSWER),
        {INCOMPLETE, UNDECLARED, UNKNOWN_CALL},
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_problems_of_tool_calls(tmp_path: Path, name: str) -> None:
    written, problems = ROWS[name]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(written), encoding="utf-8")
    [found] = Source(path=str(path)).conversations(BadRows())
    audit = ToolCallAudit(TOKENIZER)
    audit.add(found)
    assert set(audit.counts) == problems
    assert set(tool_call_problems(found)) == problems - {REORDERED}


@pytest.mark.parametrize("key", ["message.tool_call_id", "message.name"])
def test_the_order_of_results_is_free_where_the_template_says_what_they_answer(
    tmp_path: Path, key: str
) -> None:
    calls = [{"id": one, "name": f"f{one}", "arguments": {}} for one in "xy"]
    answers = [{**result(one), "name": f"f{one}"} for one in "yx"]
    written = row({"role": "assistant", "tool_calls": calls}, *answers, ANSWER)
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(written), encoding="utf-8")
    [found] = Source(path=str(path)).conversations(BadRows())
    for template, is_counted in ((TEMPLATE, True), (TEMPLATE + WRITES.format(key=key), False)):
        audit = ToolCallAudit(make_tokenizer(template))
        audit.add(found)
        assert (REORDERED in audit.counts) is is_counted


def test_the_audit_counts_rows_of_each_problem_and_names_the_first(
    tiny_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps(written) for written, _ in ROWS.values()]
    path.write_text("\n".join(lines), encoding="utf-8")
    recipe = tiny_recipe(
        data={
            "train": {"path": str(path)},
            "evaluation": None,
            "max_length": 1024,
            "max_lost": 1,
            "chat_template": "configs/chat_templates/chatml-tools.jinja",
        }
    )
    text = preview(recipe).text(0, colour=False)
    for problem in set[str]().union(*(problems for _, problems in ROWS.values())):
        places = [
            f"{path}:{number}"
            for number, (_, problems) in enumerate(ROWS.values(), start=1)
            if problem in problems
        ]
        lines = text.splitlines()
        [at] = [i for i, line in enumerate(lines) if line.startswith(f"{problem} ")]
        share = f"{len(places)} of {len(ROWS)} ({len(places) / len(ROWS):.2%})"
        assert lines[at].split(maxsplit=len(problem.split()))[-1] == share
        shown = [f"  {place}" for place in places[:3]]
        assert lines[at + 1 : at + 1 + len(shown)] == shown


def test_rows_without_problems_add_no_line(tiny_recipe: Callable[..., Any]) -> None:
    recipe = tiny_recipe()
    data: Data = recipe.data
    tokenizer = recipe.model.load_tokenizer()
    training = read_data("training", data, data.train_sources, tokenizer)
    [side] = audit_data(data, training, None, tokenizer)
    assert training.tool_problems == {}
    assert not any("tool" in finding.what for finding in side.findings)
