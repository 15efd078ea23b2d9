"""Read prompts from rows with or without an answer."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from qlora_cli.data.encode.encoder import Encoder
from qlora_cli.data.formats import (
    Feedback,
    Labelled,
    Messages,
    Preference,
    PromptCompletion,
    TemplateFormat,
    Text,
)
from qlora_cli.data.prompts import (
    PromptReader,
    Question,
    check_questions,
    prompt_source,
    read_questions,
)
from qlora_cli.data.sources import Source
from qlora_cli.errors import DataError
from qlora_cli.types import Message
from tests.conftest import exit_code, make_tokenizer

TOKENIZER = make_tokenizer()
ENCODER = Encoder(TOKENIZER)
ANSWER = Message("assistant", "", train=True)
HI = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def ask(folder: Path, row: dict[str, Any], **options: Any) -> Question:
    path = folder / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    [question] = read_questions(Source(path=str(path)), ENCODER, PromptReader(**options))
    return question


def given(question: Question) -> str:
    return str(TOKENIZER.decode(question.prompt.input_ids))


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "hi"}]},
        {"conversations": [{"from": "human", "value": "hi"}]},
        {"instruction": "hi"},
        {"instruction": "hi", "output": ""},
        {"prompt": "hi"},
        {"prompt": [{"role": "user", "content": "hi"}]},
        {"prompt": "hi", "completion": None},
        {"text": "hi"},
    ],
    ids=str,
)
def test_a_row_without_an_answer_becomes_a_prompt(tmp_path: Path, row: dict[str, Any]) -> None:
    question = ask(tmp_path, row)
    assert given(question) == HI
    assert question.reference is None
    assert (question.prompt.text, question.prompt.place) == ("hi", f"{tmp_path}/rows.jsonl:1")


@pytest.mark.parametrize(
    "row",
    [
        {
            "messages": [
                {"role": "user", "content": "hi"},
                {"role": "assistant", "content": "ho"},
            ]
        },
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]},
        {"instruction": "hi", "output": "ho"},
        {"prompt": "hi", "completion": "ho"},
    ],
    ids=str,
)
def test_the_answer_of_a_row_is_a_reference_and_not_in_the_prompt(
    tmp_path: Path, row: dict[str, Any]
) -> None:
    question = ask(tmp_path, row)
    assert given(question) == HI
    assert question.reference == "ho"


TOOLS = [{"name": "add", "parameters": {"type": "object"}}]
CALLED = '<tool_call>{"name": "add", "arguments": {}}</tool_call>'
CALLS = [{"name": "add", "arguments": {}}]
USER = {"role": "user", "content": "hi"}
WITH_TOOLS = Encoder(
    make_tokenizer(Path("configs/chat_templates/chatml-tools.jinja").read_text(encoding="utf-8"))
)


@pytest.mark.parametrize(
    ("row", "reference"),
    [
        ({"messages": [USER]}, None),
        ({"messages": [USER, {"role": "assistant", "content": "ho"}]}, "ho"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": CALLS}]}, CALLED),
        ({"messages": [USER, {"role": "assistant", "content": "ho", "tool_calls": CALLS}]},
         f"ho\n{CALLED}"),
        ({"conversations": [{"from": "human", "value": "hi"}]}, None),
        ({"conversations": [{"from": "human", "value": "hi"},
                            {"from": "function_call", "value": json.dumps(CALLS)}]}, CALLED),
        ({"instruction": "hi"}, None),
        ({"instruction": "hi", "output": "ho"}, "ho"),
        ({"prompt": "hi"}, None),
        ({"prompt": "hi", "completion": "ho"}, "ho"),
        ({"prompt": "hi", "completion": {"role": "assistant", "tool_calls": CALLS}}, CALLED),
        ({"prompt": [USER]}, None),
        ({"text": "hi"}, None),
    ],
    ids=str,
)  # fmt: skip
def test_every_prompt_has_the_tools_of_its_row(row: dict[str, Any], reference: str | None) -> None:
    for tools in (TOOLS, json.dumps(TOOLS)):
        found = PromptReader().question({**row, "tools": tools}, WITH_TOOLS)
        prompt = str(TOKENIZER.decode(found.prompt.input_ids))
        assert '{"name": "add", "parameters": {"type": "object"}}' in prompt
        assert prompt.endswith(HI)
        assert found.reference == reference


@pytest.mark.parametrize(
    ("row", "formats", "is_plain"),
    [
        ({"prompt": "hi"}, [PromptCompletion(as_chat=False)], True),
        ({"text": "hi"}, [Text()], True),
        ({"q": "hi"}, [TemplateFormat(user="{{ q }}")], False),
    ],
    ids=str,
)
def test_a_prompt_that_would_leave_out_tools_is_refused(
    tmp_path: Path, row: dict[str, Any], formats: list[Any], is_plain: bool
) -> None:
    wanted = r"rows\.jsonl:1: field 'tools': got .*has no place for tools; give the row as messages"
    with pytest.raises(DataError, match=wanted):
        ask(tmp_path, {**row, "tools": TOOLS}, formats=formats, is_plain=is_plain)
    assert given(ask(tmp_path, {**row, "tools": []}, formats=formats, is_plain=is_plain))


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "hi"},
        {"text": "hi"},
        {"instruction": "hi"},
        {"messages": [{"role": "user", "content": "hi"}]},
        {"conversations": [{"from": "human", "value": "hi"}]},
    ],
    ids=str,
)
def test_a_prompt_without_the_tools_of_training_is_warned_of_once(
    row: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    reader = PromptReader(expects_tools=True)
    reader.question({**row, "tools": TOOLS}, WITH_TOOLS)
    PromptReader().question(row, WITH_TOOLS)
    assert not caplog.records
    for _ in range(2):
        reader.question(row, WITH_TOOLS)
    [line] = [record.message for record in caplog.records]
    assert "the training rows declare tools, and this prompt has none" in line


def test_a_template_of_the_recipe_may_write_the_tools(tmp_path: Path) -> None:
    template = TemplateFormat(user="{{ q }} {{ tools | tojson }}")
    assert '"add"' in given(ask(tmp_path, {"q": "hi", "tools": TOOLS}, formats=[template]))


def test_a_tool_call_that_the_template_leaves_out_is_refused_by_its_row(tmp_path: Path) -> None:
    row = {"messages": [USER, {"role": "assistant", "tool_calls": CALLS}]}
    with pytest.raises(DataError, match=r"rows\.jsonl:1: .*omits 'add' from its tool calls"):
        ask(tmp_path, row)


def test_a_system_message_is_added_only_where_it_is_missing(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "hi"}]}
    assert given(ask(tmp_path, row, system="be brief")).startswith(
        "<|im_start|>system\nbe brief<|im_end|>\n"
    )
    row["messages"].insert(0, {"role": "system", "content": "be long"})
    assert "be brief" not in given(ask(tmp_path, row, system="be brief"))


def test_the_recipes_format_is_preferred_if_the_row_has_its_columns(tmp_path: Path) -> None:
    template = TemplateFormat(system="calm", user="Q: {{ question }}", assistant="{{ answer }}")
    found = given(ask(tmp_path, {"question": "hi"}, formats=[template]))
    assert found == HI.replace("hi", "Q: hi").replace(
        "<|im_start|>user", "<|im_start|>system\ncalm<|im_end|>\n<|im_start|>user"
    )


CALM = "<|im_start|>system\ncalm<|im_end|>\n"
QUESTION = TemplateFormat(system="calm", user="Q: {{ question }}", assistant="{{ answer }}")
ASKED = CALM + HI.replace("hi", "Q: hi")


@pytest.mark.parametrize(
    ("row", "formats", "wanted"),
    [
        ({"prompt": "hi"}, [QUESTION], ASKED),
        ({"text": "hi"}, [QUESTION], ASKED),
        ({"prompt": "hi"}, [QUESTION, QUESTION], ASKED),
        ({"prompt": "hi"}, [TemplateFormat(user="Q: {{ prompt }}", system="calm")], ASKED),
        ({"prompt": "hi"}, [TemplateFormat(user="Q: {{ q }}", system="{{ q }}")],
         ASKED.replace("calm", "hi")),
        # Messages are turns already.
        ({"messages": [{"role": "user", "content": "hi"}]}, [QUESTION], CALM + HI),
        ({"prompt": [{"role": "user", "content": "hi"}]}, [QUESTION], CALM + HI),
        ({"prompt": "hi"}, [PromptCompletion(prompt_field="q", system="calm")], CALM + HI),
    ],
    ids=str,
)  # fmt: skip
def test_a_single_text_is_put_into_the_recipes_template(
    tmp_path: Path,
    row: dict[str, Any],
    formats: list[Any],
    wanted: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    found = ask(tmp_path, {**row, "completion": "ho"}, formats=formats)
    assert given(found) == wanted
    assert not caplog.records
    [*turns] = PromptReader(formats).conversation([Message("user", "hi", train=False)])
    if isinstance(row.get("prompt"), str):
        assert given(Question(ENCODER.to_prompt([*turns, ANSWER]), None)) == wanted


@pytest.mark.parametrize(
    ("formats", "reason"),
    [
        ([TemplateFormat(user="{{ q }} {{ context }}")], r"uses 2 columns \(context, q\)"),
        ([TemplateFormat(user="Write a poem.")], r"uses 0 columns \(none\)"),
        ([TemplateFormat(user="{{ q }}", system="{{ topic }}")], "uses 2 columns"),
        ([QUESTION, Messages()], "2 sources, and they do not share one template"),
        ([QUESTION, TemplateFormat(user="{{ q }}")], "2 sources"),
    ],
    ids=str,
)
def test_a_text_that_does_not_fill_the_template_is_sent_as_typed_with_one_warning(
    formats: list[Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    reader = PromptReader(formats)
    for _ in range(2):
        conversation, _ = reader.read({"prompt": "hi"})
        assert conversation.messages[-2].content == "hi"
    [record] = caplog.records
    assert re.search(reason, record.getMessage())


def test_an_explicit_system_message_replaces_the_recipes() -> None:
    for row in ({"prompt": "hi"}, {"question": "hi"}):
        messages = PromptReader([QUESTION], system="loud").read(row)[0].messages
        assert [m.content for m in messages[:-1]] == ["loud", "Q: hi"]


@pytest.mark.parametrize(
    ("row", "formats"),
    [
        ({"prompt": "hi"}, [PromptCompletion(as_chat=False)]),
        ({"text": "hi"}, [Text()]),
        ({"prompt": "hi"}, []),
        ({"text": "hi"}, []),
    ],
    ids=str,
)
def test_without_a_template_prompts_are_continued_verbatim(
    tmp_path: Path, row: dict[str, Any], formats: list[Any]
) -> None:
    assert given(ask(tmp_path, row, formats=formats, is_plain=True)) == "hi"


def test_lines_of_a_text_file_are_messages(tmp_path: Path) -> None:
    path = tmp_path / "lines.txt"
    path.write_text("hi\n\nho\n", encoding="utf-8")
    assert [given(q) for q in read_questions(Source(path=str(path)), ENCODER, PromptReader())] == [
        HI,
        HI.replace("hi", "ho"),
    ]


def test_typed_special_tokens_are_encoded_as_text(tmp_path: Path) -> None:
    typed = ask(tmp_path, {"prompt": "hi<|im_end|>"}).prompt.input_ids
    assert typed.count(TOKENIZER.eos_token_id) == 1
    assert given(ask(tmp_path, {"prompt": "hi<|im_end|>"})).count("<|im_end|>") == 2


@pytest.mark.parametrize(
    ("name", "text", "problem", "has_hint"),
    [
        ("a.csv", "prompt\nWell, then\n", ":2: 2 fields, but the header has 1", True),
        ("a.csv", "prompt;id\nhi;1\n", ":1: the header is one column", True),
        ("a.tsv", "prompt\na\tb\n", ":2: 2 fields, but the header has 1", True),
        ("a.csv", "prompt\n\n", ": no rows", False),
        ("a.csv", "Frage\nhi\n", ":2: found 'Frage'; expected messages", False),
        ("a.jsonl", "{\n", ":1: not JSON", False),
    ],
)
def test_a_table_of_prompts_is_refused_with_its_delimiter_and_quoting(
    tmp_path: Path, name: str, text: str, problem: str, has_hint: bool
) -> None:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    for read in (
        lambda: check_questions(Source(path=str(path)), PromptReader()),
        lambda: read_questions(Source(path=str(path)), ENCODER, PromptReader()),
    ):
        with pytest.raises(DataError) as caught:
            read()
        assert f"{path}{problem}" in str(caught.value)
        assert ("data.train" in str(caught.value.hint)) is False
        assert ('quotation marks ("a, b")' in str(caught.value.hint)) is has_hint


@pytest.mark.parametrize(
    ("name", "text", "delimiter", "columns"),
    [
        ("a.csv", "prompt;id\nhi, you;1\n", ";", None),
        ("a.csv", "prompt|id\nhi, you|1\n", "|", None),
        ("a.csv", "prompt\tid\nhi, you\t1\n", "\t", None),
        ("a.tsv", "prompt,id\nhi,1\n", ",", None),
        ("a.csv", "1;hi, you\n", ";", ["id", "prompt"]),
        ("a.csv", '"hi, you"\n', None, ["prompt"]),
    ],
)
def test_a_table_of_prompts_may_have_another_delimiter_and_no_header(
    tmp_path: Path, name: str, text: str, delimiter: str | None, columns: list[str] | None
) -> None:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    source = prompt_source(str(path), delimiter=delimiter, columns=columns)
    check_questions(source, PromptReader())
    [question] = read_questions(source, ENCODER, PromptReader())
    assert question.prompt.text in ("hi, you", "hi")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--delimiter", ";;"], "delimiter (';;') has to be one character"),
        (["--delimiter", ""], "delimiter ('') has to be one character"),
        (["--columns", "a,a"], "columns names a column twice: a, a"),
        (["--delimiter", ";"], "a delimiter is for .csv, .tsv files"),
        (["--columns", "a"], "columns are for .csv, .tsv files"),
    ],
)
def test_options_of_a_table_are_refused(
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    said: str,
) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "hi"}\n', encoding="utf-8")
    files = ["--prompts", tmp_path / "a.jsonl", "--output", tmp_path / "out"]
    assert exit_code("generate", tiny_model, *files, *options) == 2
    assert said in capsys.readouterr().err


def test_prompts_are_read_before_the_model(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = shutil.copytree(tiny_model, tmp_path / "model")
    (damaged / "model.safetensors").write_bytes(b"not weights")
    (tmp_path / "a.csv").write_text("prompt\nWell, then\n", encoding="utf-8")
    command = ["generate", damaged, "--prompts", tmp_path / "a.csv", "--output", tmp_path / "out"]
    assert exit_code(*command) == 2
    assert "2 fields, but the header has 1" in capsys.readouterr().err
    (tmp_path / "a.csv").write_text("prompt\nWell\n", encoding="utf-8")
    assert exit_code(*command) == 3


def test_rows_without_a_prompt_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"x": 1}\n{"prompt": "hi"}\n{"prompt": ""}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"(?s)2 bad rows.*:1: found 'x'; expected.*:3:.*empty"):
        read_questions(Source(path=str(path)), ENCODER, PromptReader())


PAIR_COLUMNS = {"prompt_field": "q", "chosen_field": "w", "rejected_field": "l"}
ASKED, ANSWERED = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "b"}
BOTH = {"chosen": [ASKED, ANSWERED], "rejected": [ASKED, {**ANSWERED, "content": "c"}]}


@pytest.mark.parametrize(
    ("format", "row", "reference"),
    [
        (Preference(), {"prompt": "Hi"}, None),
        (Preference(), {"prompt": "Hi", "chosen": "b", "rejected": "c"}, "b"),
        (Preference(), {"prompt": "Hi", "chosen": None}, None),
        (Preference(), BOTH, "b"),
        (Preference(), {"messages": [{"role": "user", "content": "Hi"}]}, None),
        (Preference(), {"messages": BOTH["chosen"]}, "b"),
        (Preference(**PAIR_COLUMNS), {"q": "Hi", "w": "b", "l": "c"}, "b"),
        (Preference(**PAIR_COLUMNS), {"q": "Hi"}, None),
        (Preference(**PAIR_COLUMNS), {"prompt": "Hi"}, None),
        (Feedback(), {"prompt": "Hi"}, None),
        (Feedback(), {"prompt": "Hi", "completion": "b", "label": True}, "b"),
        (Feedback(), {"prompt": "Hi", "completion": "b", "label": False}, None),
        (Feedback(), {"messages": BOTH["chosen"], "label": True}, "b"),
        (Feedback(), {"messages": BOTH["chosen"], "label": 0}, None),
        (Feedback(), {"messages": BOTH["chosen"][:1]}, None),
        (Feedback(prompt_field="q"), {"q": "Hi"}, None),
        (Labelled(), {"prompt": "Hi", "label": "x"}, None),
        (Labelled(), {"text": "Hi", "label": "x"}, None),
    ],
)
def test_prompts_are_those_of_the_rows_that_were_compared_or_labelled(
    format: Any, row: dict[str, Any], reference: str | None
) -> None:
    conversation, found = PromptReader([format]).read(row)
    assert [(m.role, m.content) for m in conversation.messages[:-1]] == [("user", "Hi")]
    assert found == reference
    assert conversation.rejected is None
