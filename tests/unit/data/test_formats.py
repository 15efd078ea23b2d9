"""Every format of the union keeps its contract; what each does beyond it is tested by name."""

from __future__ import annotations

import copy
from typing import Any, get_args

import pytest
from pydantic import TypeAdapter, ValidationError

from qlora_cli.data.formats import (
    Alpaca,
    FormatConfig,
    Messages,
    PromptCompletion,
    ShareGpt,
    Text,
)
from qlora_cli.errors import DataError
from qlora_cli.types import Message

FORMATS = get_args(get_args(FormatConfig)[0])
every_format = pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: kind.__name__)


def test_the_union_is_found() -> None:
    assert len(FORMATS) >= 5


@every_format
def test_recipe_names_it_by_type(kind: Any) -> None:
    assert TypeAdapter(FormatConfig).validate_python({"type": kind().type}) == kind()


@every_format
def test_its_example_gives_something_to_learn(kind: Any) -> None:
    row = copy.deepcopy(kind.example)
    messages = kind().to_conversation(row).messages
    assert row == kind.example, "the row was changed"
    assert any(message.train for message in messages)
    assert all(message.content for message in messages)
    assert {m.role for m in messages if m.train} <= {"assistant", "text"}


@every_format
def test_an_empty_row_is_refused_by_field(kind: Any) -> None:
    with pytest.raises(DataError, match=r"field '\w+': missing; found nothing"):
        kind().to_conversation({})


@every_format
@pytest.mark.parametrize("value", [7, 1.5, True, None, {"a": 1}, [7], [None], "", [], " \n"])
def test_a_column_of_the_wrong_kind_is_refused_by_field(kind: Any, value: object) -> None:
    last = list(kind.example)[-1]
    with pytest.raises(DataError, match=f"field '{last}"):
        kind().to_conversation({**kind.example, last: value})


@every_format
def test_half_a_surrogate_pair_is_refused(kind: Any) -> None:
    def spoil(value: Any) -> Any:
        if isinstance(value, list):
            return [spoil(item) for item in value]
        if isinstance(value, dict):
            is_name = {"role", "from"}
            return {k: v if k in is_name else spoil(v) for k, v in value.items()}
        return value + "\ud83d"

    with pytest.raises(DataError, match="half of a surrogate pair"):
        kind().to_conversation(spoil(kind.example))


def test_messages_learns_every_assistant_turn() -> None:
    row = {
        "messages": [
            {"role": "system", "content": ""},
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b", "name": "helper"},
            {"role": "tool", "content": "c"},
            {"role": "assistant", "content": "d"},
        ]
    }
    messages = Messages().to_conversation(row).messages
    assert [(m.role, m.content, m.train) for m in messages] == [
        ("system", "", False),
        ("user", "a", False),
        ("assistant", "b", True),
        ("tool", "c", False),
        ("assistant", "d", True),
    ]


def test_an_unknown_role_is_named_with_its_place() -> None:
    turns = [{"role": "user", "content": "a"}] * 2 + [{"role": "humain", "content": "b"}]
    with pytest.raises(DataError) as caught:
        Messages().to_conversation({"messages": turns})
    assert str(caught.value) == (
        "field 'messages[2].role': got 'humain', expected one of system, user, assistant, tool"
    )


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        ({"content": "a"}, r"field 'messages\[0\].role': missing; found 'content'"),
        ({"role": "user"}, r"field 'messages\[0\].content': missing; found 'role'"),
        ({"role": "user", "content": " "}, r"field 'messages\[0\].content': empty"),
        ({"role": "user", "content": None}, r"field 'messages\[0\].content': got null"),
        ({"role": "user", "content": [{"type": "text"}]}, r"\(list\), expected text"),
        ({"role": ["user"], "content": "a"}, r"field 'messages\[0\].role': got \['user'\]"),
        ("user: a", r"field 'messages\[0\]': got 'user: a', expected an object"),
        ({"role": "user", "content": "a"}, "no assistant message"),
        ({"role": "assistant", "content": "a", "tool_calls": [{}]}, "'messages.0..tool_calls'"),
        ({"role": "assistant", "content": "a", "train": False}, "'messages.0..train'"),
    ],
)
def test_a_bad_turn_is_refused_by_field(turn: object, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        Messages().to_conversation({"messages": [turn]})


def test_a_long_value_is_not_shown_whole() -> None:
    with pytest.raises(DataError) as caught:
        Text().to_conversation({"text": ["word"] * 10_000})
    assert len(str(caught.value)) < 200


def test_messages_in_another_column() -> None:
    row = {"chat": Messages.example["messages"]}
    assert Messages(field="chat").to_conversation(row) == Messages().to_conversation(
        Messages.example
    )


def test_sharegpt_translates_its_roles() -> None:
    turns = [("system", "s"), ("human", "a"), ("gpt", "b"), ("user", "c"), ("assistant", "d")]
    row = {"conversations": [{"from": role, "value": text} for role, text in turns]}
    messages = ShareGpt().to_conversation(row).messages
    assert [m.role for m in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert [m.train for m in messages] == [False, False, True, False, True]


@pytest.mark.parametrize("role", ["function_call", "observation"])
def test_sharegpt_refuses_tool_turns(role: str) -> None:
    row = {"conversations": [{"from": role, "value": "{}"}]}
    with pytest.raises(DataError, match=rf"'conversations\[0\].from': got '{role}', expected one"):
        ShareGpt().to_conversation(row)


@pytest.mark.parametrize(
    ("kind", "column"),
    [(ShareGpt, "tools"), (ShareGpt, "system"), (Alpaca, "history"), (Messages, "tools")],
)
def test_a_column_that_would_be_lost_is_refused(kind: Any, column: str) -> None:
    assert kind().to_conversation({**kind.example, column: []}).messages
    assert kind().to_conversation({**kind.example, column: None}).messages
    with pytest.raises(DataError, match=f"field '{column}'.*would change what is learnt"):
        kind().to_conversation({**kind.example, column: "something"})


def test_alpaca_joins_instruction_and_input() -> None:
    user, assistant = Alpaca().to_conversation(Alpaca.example).messages
    assert user == Message("user", "Name the capital of the country.\n\nFrance", train=False)
    assert assistant == Message("assistant", "Paris.", train=True)
    for nothing in ({}, {"input": ""}, {"input": None}):
        row = {"instruction": "Say hi.", "output": "Hi.", **nothing}
        assert Alpaca().to_conversation(row).messages[0].content == "Say hi."


def test_prompt_completion_as_chat_and_verbatim() -> None:
    row = {"q": "2 + 2", "a": " 4"}
    columns = {"prompt_field": "q", "completion_field": "a"}
    chat = PromptCompletion(**columns, system="Be brief.").to_conversation(row).messages
    assert [(m.role, m.content, m.train) for m in chat] == [
        ("system", "Be brief.", False),
        ("user", "2 + 2", False),
        ("assistant", " 4", True),
    ]
    verbatim = PromptCompletion(**columns, as_chat=False).to_conversation(row).messages
    assert verbatim == [Message("text", "2 + 2", train=False), Message("text", " 4", train=True)]


def test_prompt_completion_settings_that_contradict_each_other() -> None:
    with pytest.raises(ValidationError, match=r"system.*as_chat"):
        PromptCompletion(system="a", as_chat=False)
    with pytest.raises(ValidationError, match="prompt_field and completion_field"):
        PromptCompletion(prompt_field="a", completion_field="a")
