"""Formats whose rows compare, judge or label: `preference`, `feedback`, `labelled`."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from qlora_cli.data.formats import Feedback, Labelled, Preference
from qlora_cli.errors import DataError
from qlora_cli.types import Conversation, Message

USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
WORSE = {**ANSWER, "content": "c"}
HUMAN, GPT = {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}
GPT_WORSE = {"from": "gpt", "value": "c"}
SYSTEM = {"role": "system", "content": "s"}
WHOLE = {"chosen": [USER, ANSWER], "rejected": [USER, WORSE]}
TEXTS = {"prompt": "a", "chosen": "b", "rejected": "c"}
LONG = {"role": "user", "content": "the same beginning of a long text " * 9}
CALL = {
    "role": "assistant",
    "tool_calls": [{"id": "1", "function": {"name": "add", "arguments": {}}}],
}
RESULT = {"role": "tool", "content": "3", "tool_call_id": "1"}


@pytest.mark.parametrize(
    "row",
    [
        TEXTS,
        {"prompt": [USER], "chosen": [ANSWER], "rejected": [WORSE]},
        {"prompt": USER, "chosen": ANSWER, "rejected": [WORSE]},
        {"messages": [USER], "chosen": "b", "rejected": "c", "prompt": None},
        {"conversations": [HUMAN], "chosen": GPT, "rejected": GPT_WORSE},
        {"conversations": [HUMAN], "chosen": [GPT], "rejected": [GPT_WORSE]},
        WHOLE,
        {"chosen": [HUMAN, GPT], "rejected": [HUMAN, GPT_WORSE]},
        {"chosen": [HUMAN, GPT], "rejected": [USER, WORSE]},
        # UltraFeedback: the prompt again as text, and the chosen conversation again as messages.
        {**WHOLE, "prompt": "a", "messages": [USER, ANSWER], "prompt_id": "1f"},
        {**WHOLE, "prompt": [USER]},
        {**WHOLE, "prompt": USER},
        # Marks of the row on turns of the prompt have no effect.
        {**TEXTS, "prompt": [{**USER, "train": True}]},
        {"chosen": [{**USER, "weight": 1}, ANSWER], "rejected": [USER, WORSE]},
    ],
)
def test_a_preference_is_a_prompt_with_two_answers(row: dict[str, Any]) -> None:
    question = Message("user", "a", train=False)
    assert Preference().to_conversation(row) == Conversation(
        [question, Message("assistant", "b", train=True)],
        rejected=[question, Message("assistant", "c", train=True)],
    )


def test_only_the_last_answer_of_whole_conversations_is_supervised() -> None:
    before = [SYSTEM, USER, ANSWER, {"role": "user", "content": "d"}]
    row = {
        "chosen": [*before, CALL, RESULT, {**ANSWER, "content": "3"}],
        "rejected": [*before, {**ANSWER, "content": "4"}],
    }
    read = Preference().to_conversation(row)
    assert [m.train for m in read.messages] == [False] * 4 + [True, False, True]
    assert read.rejected is not None
    assert [m.train for m in read.rejected] == [False] * 4 + [True]


@pytest.mark.parametrize("kind", ["prompt", "messages", "whole"])
def test_system_and_tools_of_a_preference_are_read(kind: str) -> None:
    tool = {"type": "function", "function": {"name": "add", "parameters": {}}}
    rows: dict[str, dict[str, Any]] = {
        "prompt": TEXTS,
        "messages": {"messages": [USER], "chosen": "b", "rejected": "c"},
        "whole": WHOLE,
    }
    read = Preference().to_conversation({**rows[kind], "system": "s", "tools": [tool]})
    assert read.tools == [tool]
    for messages in (read.messages, read.rejected or []):
        assert [m.role for m in messages] == ["system", "user", "assistant"]


@pytest.mark.parametrize(
    "row",
    [
        {**TEXTS, "prompt": [SYSTEM, USER]},
        {"chosen": [SYSTEM, USER, ANSWER], "rejected": [SYSTEM, USER, WORSE]},
    ],
)
def test_a_second_system_message_of_a_preference_is_refused(row: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="a system message has to come first"):
        Preference().to_conversation({**row, "system": "s"})


@pytest.mark.parametrize(
    ("columns", "margin"),
    [
        ({}, None),
        ({"score_chosen": None, "score_rejected": None, "margin": None}, None),
        ({"score_chosen": 8, "score_rejected": 5.5}, 2.5),
        ({"score_chosen": "8", "score_rejected": " 5.5 "}, 2.5),  # a csv file
        ({"score_chosen": "", "score_rejected": ""}, None),
        ({"score_chosen": 3, "score_rejected": 5}, -2.0),  # the audit reports it
        ({"margin": 0}, 0.0),
        ({"margin": 1.5, "score_chosen": 8, "score_rejected": 6.5}, 1.5),
    ],
)
def test_scores_become_a_margin(columns: dict[str, Any], margin: float | None) -> None:
    assert Preference().to_conversation({**TEXTS, **columns}).margin == margin


@pytest.mark.parametrize(("more", "request_"), [({"input": "x"}, "a\n\nx"), ({"input": ""}, "a")])
def test_the_input_belongs_to_the_instruction(more: dict[str, Any], request_: str) -> None:
    row = {"instruction": "a", "chosen": "b", "rejected": "c", **more}
    read = Preference(prompt_field="instruction").to_conversation(row)
    assert read.messages[0] == Message("user", request_, train=False)
    judged = {"instruction": "a", "completion": "b", "label": True, **more}
    read = Feedback(prompt_field="instruction").to_conversation(judged)
    assert read.messages[0].content == request_


def test_the_columns_of_a_preference_have_names() -> None:
    names = Preference(
        prompt_field="q", chosen_field="w", rejected_field="l", score_chosen_field="ws",
        score_rejected_field="ls", margin_field="by",
    )  # fmt: skip
    row = {"q": "a", "w": "b", "l": "c", "ws": 3, "ls": 1, "by": 2, "messages": [USER], "margin": 9}
    read = names.to_conversation(row)
    assert (read.messages[-1].content, read.margin) == ("b", 2.0)
    with pytest.raises(ValidationError, match="two of the columns are the same one"):
        Preference(chosen_field="rejected")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({**TEXTS, "prompt": None}, "field 'chosen': no prompt; expected a column prompt, conv"),
        ({**TEXTS, "messages": [USER]}, "field 'messages': 'prompt' has a prompt too"),
        (
            {**TEXTS, "rejected": [USER]},
            r"field 'prompt \+ rejected\[1\]': two messages of role user",
        ),
        ({**TEXTS, "rejected": []}, "field 'rejected': got .* expected messages"),
        ({**TEXTS, "chosen": {"from": "gpt"}}, "field 'chosen.value': missing"),
        ({**TEXTS, "rejected": None}, "field 'rejected': got null, and 'chosen' has an answer; a"),
        ({**TEXTS, "chosen": None}, "field 'chosen': got null, and 'rejected' has an answer; a"),
        ({**TEXTS, "chosen": None, "rejected": None}, "field 'chosen': got null, expected text"),
        ({"prompt": "a", "chosen": "b"}, "field 'rejected': missing; found 'prompt', 'chosen'"),
        ({**TEXTS, "chosen": " "}, "field 'chosen': empty"),
        ({**TEXTS, "rejected": 7}, r"field 'rejected': got 7 \(int\)"),
        # Whole conversations that differ before the last answer.
        (
            {**WHOLE, "rejected": [{**USER, "content": "A"}, WORSE]},
            r"field 'rejected\[0\]': 'A', where chosen\[0\] has 'a' \(at character 1\); the two",
        ),
        (
            {
                "chosen": [LONG, ANSWER],
                "rejected": [{**LONG, "content": LONG["content"] + "!"}, WORSE],
            },
            r"of a long text !', where chosen\[0\] has '.*long text ' \(at character 307\)",
        ),
        (
            {**WHOLE, "rejected": [SYSTEM, USER, WORSE]},
            r"field 'rejected\[0\]': role 'system', where chosen\[0\] has 'user'",
        ),
        (
            {"chosen": [USER, ANSWER, USER, ANSWER], "rejected": [USER, WORSE, USER, ANSWER]},
            r"field 'rejected\[1\]': 'c', where chosen\[1\] has 'b'",
        ),
        (
            {"chosen": [USER, ANSWER], "rejected": [USER, ANSWER, USER, WORSE]},
            r"field 'chosen': ends before 'rejected\[2\]'",
        ),
        (
            {**WHOLE, "rejected": [USER, CALL, RESULT, USER, WORSE]},
            r"field 'rejected\[1\]': '', where chosen\[1\] has 'b'",
        ),
        ({"chosen": [USER], "rejected": [USER]}, "field 'chosen': no assistant message"),
        (
            {"chosen": [SYSTEM, ANSWER], "rejected": [SYSTEM, WORSE]},
            "field 'chosen': no user message before the answer",
        ),
        ({"chosen": [ANSWER], "rejected": [WORSE]}, "field 'chosen': no prompt; expected a col"),
        ({**WHOLE, "rejected": [WORSE]}, "field 'chosen': no prompt"),
        ({**WHOLE, "prompt": "other"}, "field 'prompt': 'other', where chosen has 'a'"),
        ({**WHOLE, "prompt": [SYSTEM]}, "field 'prompt': role 'system', where chosen has 'user'"),
        (
            {**WHOLE, "prompt": [USER, ANSWER]},
            "field 'prompt': 2 messages; chosen has 1 before its answer; if it is not the prompt",
        ),
        (
            {**WHOLE, "rejected": [USER, {**WORSE, "train": False}]},
            "field 'rejected': every answer has train: false",
        ),
        # Scores.
        ({**TEXTS, "score_chosen": 3}, "field 'score_rejected': missing, and 'score_chosen' has"),
        (
            {**TEXTS, "score_chosen": None, "score_rejected": 1},
            "field 'score_chosen': missing, and 'score_rejected' has a score",
        ),
        (
            {**TEXTS, "score_chosen": "good", "score_rejected": "bad"},
            "field 'score_chosen': got 'good', expected a number",
        ),
        (
            {**TEXTS, "score_chosen": True, "score_rejected": False},
            r"field 'score_chosen': got True \(bool\), expected a number",
        ),
        ({**TEXTS, "margin": float("nan")}, r"field 'margin': got nan \(float\), expected a num"),
        ({**TEXTS, "margin": "inf"}, "field 'margin': got 'inf', expected a number"),
        ({**TEXTS, "margin": [1]}, r"field 'margin': got \[1\] \(list\), expected a number"),
        (
            {**TEXTS, "margin": 2, "score_chosen": 3, "score_rejected": 2},
            "field 'margin': got 2, but score_chosen - score_rejected is 1",
        ),
    ],
)
def test_a_bad_preference_is_refused_by_field(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        Preference().to_conversation(row)


JUDGED = {"prompt": "a", "completion": "b", "label": True}


@pytest.mark.parametrize(
    "row",
    [
        JUDGED,
        {"prompt": [USER], "completion": [ANSWER], "label": 1},
        {"prompt": USER, "completion": ANSWER, "label": 1.0},
        {"conversations": [HUMAN], "completion": GPT, "label": "true"},
        {"messages": [USER, ANSWER], "label": "True "},
        {"messages": [USER, ANSWER], "completion": None, "prompt": None, "label": "1"},
        {"conversations": [HUMAN, GPT], "label": True},
        {"messages": [{**USER, "train": True}, ANSWER], "label": True},
    ],
)
def test_feedback_is_an_answer_and_whether_it_is_good(row: dict[str, Any]) -> None:
    question, answer = Message("user", "a", train=False), Message("assistant", "b", train=True)
    assert Feedback().to_conversation(row) == Conversation([question, answer], label=True)
    for bad in (False, 0, "false", "0"):
        assert Feedback().to_conversation({**row, "label": bad}).label is False


def test_only_the_last_answer_of_a_judged_conversation_is_supervised() -> None:
    row = {"messages": [USER, ANSWER, USER, CALL, RESULT, ANSWER], "label": False, "system": "s"}
    messages = Feedback().to_conversation(row).messages
    assert [m.train for m in messages] == [False] * 4 + [True, False, True]
    named = Feedback(prompt_field="q", completion_field="a", label_field="ok")
    assert named.to_conversation({"q": "a", "a": "b", "ok": 0}).label is False


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"label": None}, "field 'label': got null, expected true or false"),
        ({"label": "good"}, "field 'label': got 'good', expected true or false"),
        ({"label": 2}, r"field 'label': got 2 \(int\), expected true or false"),
        ({"label": 0.5}, r"field 'label': got 0.5 \(float\)"),
        ({"label": [True]}, r"field 'label': got \[True\] \(list\)"),
        ({"label": ""}, "field 'label': got '', expected true or false"),
        ({"prompt": None}, "field 'prompt': missing; expected a column prompt, conversations, mes"),
        ({"completion": None}, "field 'completion': got null"),
        ({"completion": ""}, "field 'completion': empty"),
        ({"completion": [USER]}, r"field 'prompt \+ completion\[1\]': two messages of role user"),
        ({"messages": [USER]}, "field 'messages': 'prompt' has a prompt too"),
        (
            {"prompt": None, "completion": None, "messages": [USER]},
            "field 'messages': no assistant message",
        ),
        (
            {"prompt": None, "completion": None, "messages": [ANSWER]},
            "field 'messages': no user message before the answer",
        ),
        (
            {
                "prompt": None,
                "completion": None,
                "messages": [USER, ANSWER],
                "conversations": [GPT],
            },
            "field 'conversations': 'messages' has a conversation too",
        ),
    ],
)
def test_bad_feedback_is_refused_by_field(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        Feedback().to_conversation({**JUDGED, **change})


@pytest.mark.parametrize(
    ("label", "read"),
    [
        ("positive", "positive"),
        ("0", "0"),
        (1, 1),
        (True, True),
        (3.5, 3.5),
        (["a", "b"], ("a", "b")),
        ([], ()),
        ([27, 3], ("27", "3")),
        ("negative ", "negative "),  # the objective compares it with its labels
    ],
)
def test_a_label_is_read_as_it_is(label: Any, read: Any) -> None:
    row = Labelled().to_conversation({"text": "a", "label": label})
    assert row == Conversation([Message("text", "a", train=False)], label=read)
    assert type(row.label) is type(read)


@pytest.mark.parametrize(
    ("settings", "row", "turns"),
    [
        ({}, {"text": "a"}, [("text", "a")]),
        ({}, {"prompt": "a", "text": None}, [("text", "a")]),
        ({"as_chat": True}, {"text": "a", "system": "s"}, [("system", "s"), ("user", "a")]),
        ({}, {"messages": [USER]}, [("user", "a")]),
        ({}, {"messages": [USER, ANSWER]}, [("user", "a"), ("assistant", "b")]),
        ({}, {"conversations": [HUMAN, GPT]}, [("user", "a"), ("assistant", "b")]),
        ({}, {"prompt": [SYSTEM, USER]}, [("system", "s"), ("user", "a")]),
        ({}, {"text": [USER]}, [("user", "a")]),
        ({"field": "sentence"}, {"sentence": "a", "text": "x"}, [("text", "a")]),
        (
            {"text": "{{ premise }} => {{ hypothesis }}"},
            {"premise": "a", "hypothesis": "b", "text": "x"},
            [("text", "a => b")],
        ),
    ],
)
def test_no_turn_of_a_labelled_row_is_supervised(
    settings: dict[str, Any], row: dict[str, Any], turns: list[tuple[str, str]]
) -> None:
    read = Labelled(**settings).to_conversation({**row, "label": 1})
    assert [(m.role, m.content) for m in read.messages] == turns
    assert not any(m.train for m in read.messages)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"label": None}, "field 'label': got null, expected a text, a number or a list of labels"),
        ({"label": ""}, "field 'label': empty"),
        ({"label": float("nan")}, r"field 'label': got nan \(float\)"),
        ({"label": {"a": 1}}, r"field 'label': got \{'a': 1\} \(dict\)"),
        ({"label": [1.5]}, r"field 'label\[0\]': got 1.5 \(float\), expected text"),
        ({"label": [True]}, r"field 'label\[0\]': got True \(bool\), expected text"),
        ({"label": ["a", "a"]}, "field 'label': 'a' is in it twice"),
        ({"text": None}, "field 'text': got null, expected text or messages"),
        ({"text": "  "}, "field 'text': empty"),
        ({"text": 7}, r"field 'text': got 7 \(int\)"),
        ({"text": [USER, USER]}, r"field 'text\[1\]': two messages of role user in a row"),
        ({"text": [RESULT]}, r"field 'text\[0\]': a tool's answer without a call before it"),
        ({"messages": [USER]}, "field 'messages': 'text' has a content too; name one of them"),
    ],
)
def test_a_bad_labelled_row_is_refused_by_field(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        Labelled().to_conversation({"text": "a", "label": "x", **change})


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"field": "a", "text": "{{ a }}"}, "field .* and text are both given"),
        ({"text": "{{ a"}, "text: line 1 of the template"),
        ({"field": "label"}, "field and label_field are the same column"),
    ],
)
def test_settings_of_labels_that_contradict_each_other(
    settings: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValidationError, match=reason):
        Labelled(**settings)
