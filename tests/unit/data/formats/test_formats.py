"""Every format of the union keeps its contract; what each does beyond it is tested by name."""

from __future__ import annotations

import copy
import json
from typing import Any, get_args

import pytest
from pydantic import TypeAdapter, ValidationError

from qlora_cli.data.formats import (
    Alpaca,
    FormatConfig,
    Messages,
    Preference,
    PromptCompletion,
    ShareGpt,
    TemplateFormat,
    Text,
)
from qlora_cli.errors import DataError
from qlora_cli.types import Conversation, Message, ToolCall
from tests.conftest import DATA, needs_data

FORMATS = get_args(get_args(FormatConfig)[0])
every_format = pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: kind.__name__)


def test_the_format_union_is_found() -> None:
    assert len(FORMATS) >= 6


@every_format
def test_recipe_names_it_by_type(kind: Any) -> None:
    assert TypeAdapter(FormatConfig).validate_python({"type": kind().type}) == kind()


@every_format
def test_each_formats_example_has_supervised_tokens(kind: Any) -> None:
    row = copy.deepcopy(kind.example)
    messages = kind().to_conversation(row).messages
    assert row == kind.example, "the row was changed"
    assert any(message.train for message in messages) is (kind.rows != "labels")
    assert all(message.content for message in messages)
    assert {m.role for m in messages if m.train} <= {"assistant", "text"}


@every_format
def test_rows_hold_what_the_kind_of_a_format_says(kind: Any) -> None:
    row = kind().to_conversation(kind.example)
    assert (row.rejected is not None) is (kind.rows == "pairs")
    assert (row.label is not None) is (kind.rows in ("feedback", "labels"))


@every_format
def test_an_empty_row_is_refused_by_field(kind: Any) -> None:
    with pytest.raises(DataError, match=r"field '\w+': missing; found nothing"):
        kind().to_conversation({})


@every_format
@pytest.mark.parametrize("value", [7, 1.5, True, None, {"a": 1}, [7], [None], "", [], " \n"])
def test_a_column_of_the_wrong_kind_is_refused_by_field(kind: Any, value: object) -> None:
    last = list(kind.example)[-1]
    if kind is TemplateFormat and isinstance(value, int | float):
        return  # a template writes numbers as text
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
        return value + "\ud83d" if isinstance(value, str) else value

    with pytest.raises(DataError, match="half of a surrogate pair"):
        kind().to_conversation(spoil(kind.example))


CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
USER = {"role": "user", "content": "a"}
ANSWER = {"role": "assistant", "content": "b"}


def of_messages(*turns: object, **columns: object) -> Conversation:
    return Messages().to_conversation({"messages": list(turns), **columns})


def test_messages_learns_every_assistant_turn() -> None:
    turns = [
        {"role": "developer", "content": ""},
        USER,
        {**ANSWER, "name": "helper", "tool_calls": None},
        {"role": "user", "content": [{"type": "text", "text": x} for x in ("c", "d")]},
        {"role": "assistant", "content": "e"},
    ]
    messages = of_messages(*turns).messages
    assert [(m.role, m.content, m.train) for m in messages] == [
        ("system", "", False),
        ("user", "a", False),
        ("assistant", "b", True),
        ("user", "cd", False),
        ("assistant", "e", True),
    ]


@pytest.mark.parametrize("is_sharegpt", [False, True])
def test_keys_of_a_turn_that_are_not_read_are_noted(is_sharegpt: bool) -> None:
    more = {"id": 1, "name": "Bo", "note": None, "train": True, "weight": 1}
    row = ShareGpt.example if is_sharegpt else Messages.example
    [(field, turns)] = row.items()
    form: Any = ShareGpt() if is_sharegpt else Messages()
    read = form.to_conversation({field: [*turns[:-1], {**turns[-1], **more}]}).messages
    assert [message.ignored for message in read] == [*[()] * (len(turns) - 1), ("id", "name")]
    tool = {"role": "tool", "content": "2", "name": "add", "tool_call_id": "1", "more": 1}
    asked = {**ANSWER, "tool_calls": [CALL], "reasoning": "so"}
    noted = [message.ignored for message in of_messages(USER, asked, tool, ANSWER).messages]
    assert noted == [(), (), ("more",), ()]


@pytest.mark.parametrize("arguments", [{"a": 1}, '{"a": 1}'])
@pytest.mark.parametrize("is_wrapped", [True, False])
def test_messages_reads_tool_calls_and_their_answers(arguments: object, is_wrapped: bool) -> None:
    function = {"name": "add", "arguments": arguments}
    call = {"id": "1", "type": "function", "function": function} if is_wrapped else function
    tool = {"role": "tool", "content": "2", "name": "add", "tool_call_id": "1"}
    asked = {"role": "assistant", "content": None, "tool_calls": [call]}
    given = of_messages(USER, asked, tool, ANSWER, tools=[TOOL])
    number = "1" if is_wrapped else None
    assert given.messages[1] == Message(
        "assistant", "", train=True, tool_calls=(ToolCall("add", {"a": 1}, number),)
    )
    assert given.messages[2] == Message("tool", "2", False, name="add", tool_call_id="1")
    assert given.tools == [TOOL]
    for tools in (json.dumps([TOOL]), [TOOL["function"]]):
        assert of_messages(USER, asked, tool, ANSWER, tools=tools) == given


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_messages_reads_reasoning_under_each_of_its_names(key: str) -> None:
    assert of_messages(USER, {**ANSWER, key: "so"}).messages[1].reasoning == "so"


def test_an_answer_may_be_excluded_from_training() -> None:
    messages = of_messages(USER, {**ANSWER, "train": False}, USER, ANSWER).messages
    assert [message.train for message in messages] == [False, False, False, True]
    with pytest.raises(DataError, match="every answer has train: false"):
        of_messages(USER, {**ANSWER, "train": False})


def test_an_unknown_role_is_named_with_its_place() -> None:
    turns = [{"role": "user", "content": "a"}] * 2 + [{"role": "humain", "content": "b"}]
    with pytest.raises(DataError) as caught:
        Messages().to_conversation({"messages": turns})
    assert str(caught.value) == (
        "field 'messages[2].role': got 'humain', "
        "expected one of system, developer, user, assistant, tool"
    )


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        ({"content": "a"}, r"field 'messages\[0\].role': missing; found 'content'"),
        ({"role": "user"}, r"field 'messages\[0\].content': missing; found 'role'"),
        ({"role": "user", "content": " "}, r"field 'messages\[0\].content': empty"),
        ({"role": "user", "content": None}, r"field 'messages\[0\].content': got null"),
        ({"role": "user", "content": [{"type": "text"}]}, r"content\[0\].text': missing"),
        ({"role": "user", "content": [{"type": "image"}]}, r"content\[0\].type': got 'image'"),
        ({"role": "user", "content": ["a"]}, r"content\[0\]': got 'a', expected an object"),
        ({"role": "user", "content": []}, r"field 'messages\[0\].content': empty"),
        ({"role": ["user"], "content": "a"}, r"field 'messages\[0\].role': got \['user'\]"),
        ("user: a", r"field 'messages\[0\]': got 'user: a', expected an object"),
        ({"role": "user", "content": "a"}, "no assistant message"),
        ({**ANSWER, "tool_calls": [{}]}, r"'messages.0..tool_calls\[0\].name': missing"),
        ({**ANSWER, "tool_calls": {"a": 1}}, r"'messages.0..tool_calls': got .* a list of calls"),
        ({**ANSWER, "tool_calls": "[{"}, r"'messages.0..tool_calls': got '\[{', which is not JSON"),
        ({**ANSWER, "tool_calls": [{"name": "f"}]}, r"tool_calls\[0\].arguments': missing"),
        (
            {**ANSWER, "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]},
            r"tool_calls\[0\].function.arguments': got \[1\] \(list\), expected an object",
        ),
        ({**ANSWER, "function_call": {"name": "f"}}, r"'messages.0..function_call'.* not read"),
        ({**ANSWER, "train": "no"}, r"'messages.0..train': got 'no', expected true or false"),
        ({**ANSWER, "weight": 0.5}, r"'messages.0..weight': got 0.5 .float., expected 0 or 1"),
        ({**ANSWER, "weight": 1, "train": False}, r"weight': got 1, and train is false"),
        ({**ANSWER, "reasoning": "x", "thinking": "y"}, "thinking': not the same as reasoning"),
        ({**USER, "reasoning": "x"}, r"'messages.0..reasoning'.* not read"),
        ({**USER, "tool_calls": [CALL]}, r"'messages.0..tool_calls'.* not read"),
        ({**USER, "tool_call_id": "1"}, r"'messages.0..tool_call_id'.* not read"),
    ],
)
def test_a_bad_turn_is_refused_by_field(turn: object, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        Messages().to_conversation({"messages": [turn]})


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([USER, USER, ANSWER], r"messages\[1\]': two messages of role user in a row"),
        ([USER, ANSWER, ANSWER], r"messages\[2\]': two messages of role assistant in a row"),
        ([USER, {"role": "system", "content": "s"}, ANSWER], "system message has to come first"),
        ([USER, ANSWER, USER], r"ends with a message of role user, so its answer is missing"),
        (
            [USER, ANSWER, {"role": "tool", "content": "2"}],
            "a tool's answer without a call before it",
        ),
        (
            [USER, {**ANSWER, "tool_calls": [CALL]}, *[{"role": "tool", "content": "2"}] * 2],
            r"messages\[3\]': a tool's answer without a call",
        ),
    ],
)
def test_a_conversation_out_of_order_is_refused_by_place(turns: list[Any], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        of_messages(*turns)


@pytest.mark.parametrize(
    ("tools", "reason"),
    [
        ("something", "field 'tools': got 'something', which is not JSON"),
        ({"a": 1}, "expected a list of functions"),
        (["add"], r"field 'tools\[0\]': got 'add', expected an object"),
        ([{"description": "adds"}], r"field 'tools\[0\].function.name': missing"),
        ([{"type": "function", "function": {"name": 1}}], r"function.name': got 1"),
    ],
)
def test_bad_tools_are_refused_by_field(tools: object, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        of_messages(USER, ANSWER, tools=tools)


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


def of_sharegpt(*turns: tuple[str, Any], **columns: object) -> Conversation:
    conversations = [{"from": role, "value": text} for role, text in turns]
    return ShareGpt().to_conversation({"conversations": conversations, **columns})


@pytest.mark.parametrize("in_list", [False, True])
def test_sharegpt_reads_calls_observations_tools_and_system(in_list: bool) -> None:
    call = {"name": "add", "arguments": {"a": 1}}
    given = of_sharegpt(
        ("human", "a"),
        ("function_call", json.dumps([call] if in_list else call)),
        ("observation", "2"),
        ("gpt", "b"),
        system="s",
        tools=json.dumps([TOOL["function"]]),
    )
    assert given == Conversation(
        [
            Message("system", "s", train=False),
            Message("user", "a", train=False),
            Message("assistant", "", train=True, tool_calls=(ToolCall("add", {"a": 1}),)),
            Message("tool", "2", train=False),
            Message("assistant", "b", train=True),
        ],
        tools=[TOOL],
    )


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("add(1)", r"conversations\[1\].value': got 'add\(1\)', which is not JSON"),
        ("3", r"conversations\[1\].value': got 3 \(int\), expected an object"),
        ("[]", r"conversations\[1\].value': it has no call"),
        ('{"name": "add"}', r"conversations\[1\].value.arguments': missing"),
    ],
)
def test_sharegpt_refuses_a_bad_call_by_field(value: str, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        of_sharegpt(("human", "a"), ("function_call", value), ("observation", "2"), ("gpt", "b"))


def test_sharegpt_refuses_two_system_messages() -> None:
    with pytest.raises(DataError, match="a system message has to come first"):
        of_sharegpt(("system", "s"), ("human", "a"), ("gpt", "b"), system="t")


@pytest.mark.parametrize(
    ("kind", "column"),
    [(ShareGpt, "tools"), (ShareGpt, "system"), (Alpaca, "history"), (Messages, "tools")],
)
def test_an_optional_column_may_hold_nothing(kind: Any, column: str) -> None:
    plain = kind().to_conversation(kind.example)
    for nothing in ([], None, "", "[]"):
        assert kind().to_conversation({**kind.example, column: nothing}) == plain


def test_alpaca_joins_instruction_and_input() -> None:
    user, assistant = Alpaca().to_conversation(Alpaca.example).messages
    assert user == Message("user", "Name the capital of the country.\n\nFrance", train=False)
    assert assistant == Message("assistant", "Paris.", train=True)
    for nothing in ({}, {"input": ""}, {"input": None}):
        row = {"instruction": "Say hi.", "output": "Hi.", **nothing}
        assert Alpaca().to_conversation(row).messages[0].content == "Say hi."


def test_alpaca_puts_system_and_history_first() -> None:
    row = {"instruction": "c", "output": "d", "system": "s", "history": [["a", "b"]]}
    messages = Alpaca().to_conversation(row).messages
    assert [(m.role, m.content, m.train) for m in messages] == [
        ("system", "s", False),
        ("user", "a", False),
        ("assistant", "b", True),
        ("user", "c", False),
        ("assistant", "d", True),
    ]
    assert Alpaca().to_conversation({**row, "history": '[["a", "b"]]'}).messages == messages


@pytest.mark.parametrize("history", ["something", [["a"]], [["a", 1]], {"a": "b"}, ["ab"], 3])
def test_alpaca_refuses_a_bad_history_by_field(history: object) -> None:
    with pytest.raises(DataError, match="field 'history"):
        Alpaca().to_conversation({**Alpaca.example, "history": history})


def test_prompt_completion_reads_lists_of_messages() -> None:
    row = {"prompt": [USER, ANSWER, USER], "completion": [{"role": "assistant", "content": "c"}]}
    messages = PromptCompletion(system="s").to_conversation(row).messages
    assert [m.role for m in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert [m.train for m in messages] == [False, False, False, False, True]
    with pytest.raises(DataError, match="as_chat is false"):
        PromptCompletion(as_chat=False).to_conversation(row)
    with pytest.raises(DataError, match="field 'completion': ends with a message of role user"):
        PromptCompletion().to_conversation({**row, "completion": [ANSWER, USER]})


REAL = [
    ("toolcall/glaive_toolcall_en_demo.json", ShareGpt()),
    ("preference/dpo_en_demo.json", Preference()),
    ("alpaca/alpaca_en_demo.json", Alpaca()),
    ("gsm8k/test.jsonl", PromptCompletion(prompt_field="question", completion_field="answer")),
    ("mmlu/zero_shot_val.jsonl", PromptCompletion(prompt_field="input", completion_field="output")),
]


@needs_data
@pytest.mark.parametrize(("path", "kind"), REAL, ids=[path for path, _ in REAL])
def test_real_rows_are_read(path: str, kind: Any) -> None:
    text = (DATA / path).read_text(encoding="utf-8")
    rows = json.loads(text) if path.endswith(".json") else map(json.loads, text.splitlines())
    read = [kind.to_conversation(row) for row in rows]
    assert len(read) >= 300
    assert all(row.messages[-1].train for row in read)


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
