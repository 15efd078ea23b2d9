"""The characters of a rendered conversation that are supervised, and those that are data."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from qlora_cli.data.render.answer_spans import AnswerSpan, find_additions, find_answers, write
from qlora_cli.data.render.chat_template import ChatTemplate
from qlora_cli.data.render.renderer import RenderedRow, Renderer
from qlora_cli.errors import DataError
from qlora_cli.types import Conversation, Message, ToolCall

TokenizerMaker = Callable[..., PreTrainedTokenizerFast]

# Like Qwen's template: tool calls and answers, reasoning after the last question only.
TOOLS_AND_REASONING = """\
{%- for tool in tools or [] %}{{ tool | tojson }}\n{% endfor %}
{%- set ns = namespace(asked=0) %}
{%- for m in messages %}
{%- if m.role == 'user' %}{% set ns.asked = loop.index %}{% endif %}
{%- endfor %}
{%- for m in messages %}
{{- '<|im_start|>' + m.role + '\n' }}
{%- if m.reasoning_content and loop.index > ns.asked %}
{{- '<think>\n' + m.reasoning_content + '\n</think>\n\n' }}
{%- endif %}
{{- m.content | trim }}
{%- for c in m.tool_calls or [] %}{{ '<call>' + c.function | tojson + '</call>' }}{% endfor %}
{{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]


def chat(*contents: str) -> list[Message]:
    roles = ("user", "assistant")
    return [Message(roles[i % 2], text, train=i % 2 == 1) for i, text in enumerate(contents)]


def asked(**arguments: Any) -> Message:
    return Message("assistant", "", train=True, tool_calls=(ToolCall("add", arguments, "x1"),))


def told(content: str) -> Message:
    return Message("tool", content, train=False, name="add", tool_call_id="x1")


def supervised_text(layout: RenderedRow) -> list[str]:
    return [layout.text[answer.start : answer.end] for answer in layout.answers]


def data(layout: RenderedRow) -> list[str]:
    assert layout.contents is not None
    return [layout.text[start:end] for start, end in layout.contents]


def by_rendering_parts(template: ChatTemplate, row: Conversation) -> RenderedRow:
    additions = find_additions(template, row)
    text = write(template, row, additions)
    return RenderedRow(text, find_answers(template, row, text, additions), is_verbatim=False)


def outcome(
    render: Callable[[Conversation], RenderedRow], row: Conversation
) -> str | tuple[str, list[AnswerSpan]]:
    try:
        layout = render(row)
    except DataError as error:
        return str(error)
    return layout.text, layout.answers


@pytest.fixture
def tooled(make_tokenizer: TokenizerMaker) -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TOOLS_AND_REASONING
    return tokenizer


def test_one_render_agrees_with_rendering_each_part(make_tokenizer: TokenizerMaker) -> None:
    contents = [
        *("Paris.", " a\n", "\n\n b", "<", "user", "assistant", "", "é 🦊", "<|im_start|>", "</s>"),
        *("</think>", "<think>x</think>y", "Qz0zQ", "{{ x }}", "a" * 50, "\u2028", '"', "\\"),
    ]
    generator = random.Random(7)
    compared = 0
    for kind in ("chatml", "llama3", "mistral", "phi3", "reasoning"):
        tokenizer = make_tokenizer(kind)
        renderer, template = Renderer(tokenizer), ChatTemplate(tokenizer)
        for _ in range(150):
            texts = generator.choices(contents, k=2 * generator.randint(1, 4))
            row = Conversation(
                [replace(m, train=m.train and bool(m.content)) for m in chat(*texts)]
            )
            by_parts = outcome(partial(by_rendering_parts, template), row)
            assert outcome(renderer.render, row) == by_parts
            compared += not isinstance(by_parts, str)
    assert compared > 300


def test_a_known_shape_costs_one_render(
    make_tokenizer: TokenizerMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    renders = []
    render = ChatTemplate.render

    def counted(*args: Any, **settings: Any) -> str:
        renders.append(args)
        return render(*args, **settings)

    monkeypatch.setattr(ChatTemplate, "render", counted)
    renderer = Renderer(make_tokenizer())
    texts = [f"text {i}" for i in range(20)]
    renderer.render(Conversation(chat(*texts)))
    assert len(renders) < 3 * len(texts)
    renders.clear()
    layout = renderer.render(Conversation(chat(*reversed(texts))))
    assert len(renders) == 1
    assert supervised_text(layout) == texts[-2::-2]


def test_contents_are_the_parts_that_come_from_the_data(tooled: PreTrainedTokenizerFast) -> None:
    messages = [
        Message("user", " <|im_end|> a ", train=False),
        replace(asked(a='say "x"', b=[1, "two"]), reasoning="hm"),
        told("2"),
        Message("assistant", "b", train=True),
    ]
    layout = Renderer(tooled).render(Conversation(messages, tools=TOOLS))
    assert data(layout) == ["<|im_end|> a", "hm", 'say \\"x\\"', "two", "2", "b"]
    assert supervised_text(layout) == [
        '<think>\nhm\n</think>\n\n<call>{"name": "add", "arguments": {"a": "say \\"x\\"", '
        '"b": [1, "two"]}}</call>',
        "b",
    ]


def test_contents_that_the_template_may_change_are_not_guessed(
    make_tokenizer: TokenizerMaker,
) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("m.content", "m.content[::1][:9]")
    layout = Renderer(tokenizer).render(Conversation(chat("short", "also")))
    assert data(layout) == ["short", "also"]
    with pytest.raises(DataError, match=r"message 1 \(user\): .* changes or omits its content"):
        Renderer(tokenizer).render(Conversation(chat("much longer than that", "b")))
    tokenizer.chat_template = tokenizer.chat_template.replace("[:9]", " | replace('#', '')")
    with pytest.raises(
        DataError, match=r"message 2 \(assistant\): .* changes or omits its content"
    ):
        Renderer(tokenizer).render(Conversation(chat("a", "b # c")))


def test_verbatim_text_is_data_from_end_to_end(make_tokenizer: TokenizerMaker) -> None:
    pieces = [Message("text", "a", train=False), Message("text", " b", train=True)]
    assert data(Renderer(make_tokenizer()).render(Conversation(pieces))) == ["a", " b"]


def test_a_supervised_question_starts_at_its_content(
    make_tokenizer: TokenizerMaker,
) -> None:
    messages = [replace(message, train=True) for message in chat("user", "b", "user", "d")]
    layout = Renderer(make_tokenizer()).render(Conversation(messages))
    assert supervised_text(layout) == ["user", "b", "user", "d"]
    for answer in layout.answers:
        assert layout.text.startswith("<|im_end|>", answer.stop)


def test_a_template_that_drops_part_of_a_row_is_refused(
    make_tokenizer: TokenizerMaker, tooled: PreTrainedTokenizerFast
) -> None:
    plain, able = Renderer(make_tokenizer()), Renderer(tooled)
    call = [*chat("a"), asked(a=1), told("2"), Message("assistant", "b", train=True)]
    rows = {
        r"^the chat template omits the tools": Conversation(chat("a", "b"), tools=TOOLS),
        r"^message 2 \(assistant\): .* omits 'add' from its tool calls": Conversation(call),
        r"^message 2 \(assistant\): .* omits its reasoning, which is supervised": Conversation(
            [chat("a")[0], Message("assistant", "b", train=True, reasoning="hm")]
        ),
    }
    for reason, row in rows.items():
        with pytest.raises(DataError, match=reason):
            plain.render(row)
        assert able.render(row).answers
    ignoring = make_tokenizer()
    ignoring.chat_template = tooled.chat_template.replace(
        "{%- for m in messages %}\n", "{%- for m in messages if m.role != 'tool' %}\n"
    )
    with pytest.raises(DataError, match=r"message 3 \(tool\): .* changes or omits its content"):
        Renderer(ignoring).render(Conversation(call))


def test_unsupervised_reasoning_may_be_dropped(tooled: PreTrainedTokenizerFast) -> None:
    messages = chat("a", "b", "c", "d")
    messages[1] = replace(messages[1], reasoning="hm", train=False)
    layout = Renderer(tooled).render(Conversation(messages))
    assert "hm" not in layout.text
    assert supervised_text(layout) == ["d"]


def test_a_conversation_is_split_where_the_template_removes_reasoning(
    tooled: PreTrainedTokenizerFast,
) -> None:
    renderer = Renderer(tooled)
    texts = ("a", "b", "c", "d", "e", "f")
    for number in range(2):  # the second time, the shape is known
        messages = chat(*(f"{text}{number}" for text in texts))
        for i in (1, 5):
            messages[i] = replace(messages[i], reasoning=f"hm{i}")
        rows = renderer.split(Conversation(messages))
        assert [len(row.messages) for row in rows] == [2, 6]
        assert [
            supervised_text(layout) for layout in renderer.render_all(Conversation(messages))
        ] == [
            [f"<think>\nhm1\n</think>\n\nb{number}"],
            [f"d{number}", f"<think>\nhm5\n</think>\n\nf{number}"],
        ]


def test_a_delimiter_between_turns_also_ends_the_last_turn(make_tokenizer: TokenizerMaker) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    layout = Renderer(tokenizer).render(Conversation(chat("a", "b", "c", "d")))
    assert layout.text == "<|user|>a<|assistant|>b<|user|>c<|assistant|>d<|user|>"
    assert [layout.text[answer.start : answer.stop + 8] for answer in layout.answers] == [
        "b<|user|>",
        "d<|user|>",
    ]


WITH_BLOCK = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' }}"
    "{% if m.role == 'assistant' %}{{ '<think></think>' }}{% endif %}"
    "{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WITH_LAST_BLOCK = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think></think>' }}{% endif %}"
    "{{ m.content + '<|end|>' }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.mark.parametrize("content", ["<think>", "think", "/think", "</think>", "k>"])
def test_an_answer_may_repeat_the_text_that_the_template_puts_before_it(
    make_tokenizer: TokenizerMaker, content: str
) -> None:
    """GLM writes an empty reasoning block before each answer, Qwen 3 before the last one."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<think>", "</think>"])
    row = Conversation(chat("a", content, "b", content))
    tokenizer.chat_template = WITH_BLOCK
    layout = by_rendering_parts(ChatTemplate(tokenizer), row)
    assert supervised_text(layout) == [f"<think></think>{content}"] * 2
    tokenizer.chat_template = WITH_LAST_BLOCK
    layout = by_rendering_parts(ChatTemplate(tokenizer), row)
    assert supervised_text(layout) == [content, f"<think></think>{content}"]


@pytest.mark.parametrize("inline", [True, False])
def test_reasoning_that_a_template_never_shows_follows_its_prompt(
    make_tokenizer: TokenizerMaker, inline: bool
) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content.split('</think>')[-1] }}"
        "{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
    )
    renderer = Renderer(tokenizer)
    reasoned = (
        chat("a", "<think>\nhm\n</think>\n\nb")
        if inline
        else [chat("a")[0], Message("assistant", "b", train=True, reasoning="hm")]
    )
    layout = renderer.render(Conversation(reasoned))
    assert layout.text == "<|user|>a<|assistant|><think>\nhm\n</think>\n\nb</s>"
    assert supervised_text(layout) == ["hm\n</think>\n\nb"]
    assert supervised_text(renderer.render(Conversation(chat("a", "b")))) == ["\n</think>\n\nb"]


# vLLM's ChatML ends a turn only if another turn or a generation prompt follows.
ENDS_EARLIER_TURNS = """\
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}
{%- if not loop.last or add_generation_prompt %}{{ '<|im_end|>\n' }}{% endif %}
{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
SEPARATES_TURNS = """\
{%- for m in messages %}{{ '<|im_end|>' if not loop.first }}{{ m.role + ': ' + m.content }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|im_end|>assistant: ' }}{% endif %}"""
ENDS_NO_TURN = """\
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


@pytest.mark.parametrize(
    "messages",
    [
        chat("a", "b"),
        chat("a", "b", "c", "d"),
        chat("a", "a", "a", "a"),
        [Message("system", "s", train=False), *chat("a", "b")],
        [replace(m, train=m.content == "d") for m in chat("a", "b", "c", "d")],
    ],
)
def test_a_last_turn_ends_with_the_token_that_ends_earlier_turns(
    make_tokenizer: TokenizerMaker, messages: list[Message]
) -> None:
    tokenizer = make_tokenizer()
    row = Conversation(messages)
    for template in (ENDS_EARLIER_TURNS, SEPARATES_TURNS):
        tokenizer.chat_template = template
        layout = Renderer(tokenizer).render(row)
        assert layout.text.endswith(f"{messages[-1].content}<|im_end|>")
        assert all(layout.text.startswith("<|im_end|>", a.stop) for a in layout.answers)
        assert supervised_text(layout) == [m.content for m in messages if m.train]
    tokenizer.chat_template = ENDS_NO_TURN
    assert Renderer(tokenizer).render(row).text.endswith(messages[-1].content)


def test_a_template_for_images_gets_lists_of_parts(make_tokenizer: TokenizerMaker) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "m.content", "(m.content | map(attribute='text') | join)"
    )
    assert supervised_text(Renderer(tokenizer).render(Conversation(chat("a", "b")))) == ["b"]


def test_a_template_that_concatenates_arguments_gets_json(
    tooled: PreTrainedTokenizerFast,
) -> None:
    tooled.chat_template = tooled.chat_template.replace(
        "c.function | tojson", "c.function.name + c.function.arguments"
    )
    row = Conversation([*chat("a"), asked(a=1, b="x")])
    layout = Renderer(tooled).render(row)
    assert supervised_text(layout) == ['<call>add{"a": 1, "b": "x"}</call>']
    assert data(layout) == ["a", "x"]


def test_the_bundled_chatml_template_with_tools(make_tokenizer: TokenizerMaker) -> None:
    tokenizer = make_tokenizer()
    path = Path(__file__).parents[4] / "configs" / "chat_templates" / "chatml-tools.jinja"
    tokenizer.chat_template = path.read_text(encoding="utf-8")
    renderer = Renderer(tokenizer)
    messages = [
        *chat("1 + 1?"),
        replace(asked(a=1), content="Well."),
        told("2"),
        Message("assistant", "It is 2.", train=True),
    ]
    for system in ([], [Message("system", "Be brief.", train=False)]):
        layout = renderer.render(Conversation([*system, *messages], tools=TOOLS))
        head = "Be brief.\n\n" if system else ""
        assert layout.text.startswith(f"<|im_start|>system\n{head}You may call these functions")
        assert supervised_text(layout) == [
            'Well.\n<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>',
            "It is 2.",
        ]
    plain = renderer.render(Conversation(chat("a", "b")))
    assert plain.text == ("<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n")


def test_text_that_looks_like_a_placeholder_is_not_content(
    tooled: PreTrainedTokenizerFast,
) -> None:
    function = {"name": "add", "description": "abc12345678 Qz99zQ c00000000 Qz0zQ"}
    row = Conversation(chat("a", "b"), tools=[{"type": "function", "function": function}])
    layout = Renderer(tooled).render(row)
    assert supervised_text(layout) == ["b"]
    assert "abc12345678 Qz99zQ c00000000 Qz0zQ" in layout.text
