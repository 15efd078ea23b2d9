"""Test chat templates of real models, and record the outcomes.

The templates are read from the installed TRL, and from the packages below QLORA_TEMPLATES.
Every template is tested with a byte-level tokenizer that has the special tokens it writes. The rows
that `qlora` makes are compared with `apply_chat_template` called by hand.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from qlora_cli.data.render.renderer import RenderedRow, Renderer
from qlora_cli.errors import DataError
from qlora_cli.types import Conversation, Message, ToolCall
from tests.conftest import make_tokenizer

GOLDEN = Path(__file__).parent / "templates.json"
"""Outcomes of TRL's templates."""
GOLDEN_PACKAGES = Path(__file__).parent / "templates_packages.json"
"""Outcomes of the templates below QLORA_TEMPLATES: those of axolotl and vLLM."""

# BOS and EOS of the models, by the beginning of the template's name.
_ENDS = {
    "alpaca": ("<s>", "</s>"),
    "aya": ("<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>"),
    "basic": ("<s>", "</s>"),
    "blip2": ("</s>", "</s>"),
    "chatml": (None, "<|im_end|>"),
    "command_a": ("<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>"),
    "cohere": ("<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>"),
    "deepseek": ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    "diffusion_gemma": ("<bos>", "<eos>"),
    "exaone": ("[BOS]", "[|endofturn|]"),
    "falcon_h1": ("<|begin_of_text|>", "<|end_of_text|>"),
    "gemma": ("<bos>", "<eos>"),
    "glm": (None, "<|endoftext|>"),
    "gptoss": ("<|startoftext|>", "<|return|>"),
    "idefics3": ("<|begin_of_text|>", "<end_of_utterance>"),
    "jamba": ("<|startoftext|>", "<|endoftext|>"),
    "kimi": ("[BOS]", "[EOS]"),
    "lfm2": ("<|startoftext|>", "<|im_end|>"),
    "llama": ("<|begin_of_text|>", "<|eot_id|>"),
    "llama4": ("<|begin_of_text|>", "<|eot|>"),
    "llava": ("<s>", "</s>"),
    "metharme": ("<s>", "</s>"),
    "minicpm": (None, "<|im_end|>"),
    "mistral": ("<s>", "</s>"),
    "muse": ("<|begin_of_text|>", "<|eot|>"),
    "nemotron": (None, "<|im_end|>"),
    "phi": (None, "<|endoftext|>"),
    "phi_3": ("<s>", "<|endoftext|>"),
    "phi_4": (None, "<|im_end|>"),
    "pixtral": ("<s>", "</s>"),
    "qwen": (None, "<|im_end|>"),
    "smolvlm": ("<|im_start|>", "<end_of_utterance>"),
}
_ADDED = re.compile(
    r"<\|[^\s'\"{}|<>]+\|>|<\|[a-z_]+>|<[a-z_]+\|>|<\|\"\|>|<｜[^\s'\"{}<>]+｜>|"
    r"</?(?:think|tool_call|tool_response)>|<(?:start|end)_of_\w+>|<image>|<sop>|\[gMASK\]|"
    r"\[\|[a-z]+\|\]|\[/?(?:INST|IMG|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS)\]"
)
_MARKS = re.compile(
    r"</?think>|<\|?\w+\|?>|\b(?:thought|analysis|assistant|final|to=user|to=self)\b"
)
_NO_THINKING = ", enable_thinking = false"
_IN_PARTS = ("idefics3", "llava", "smolvlm")
_JSON_ARGUMENTS = ("deepseek",)
NO_REASONING_KEPT = ("deepseek_r1_distill", "deepseekv3")
"""The prompt ends in `<think>`, which the text of a conversation never contains."""
NO_END_OF_TURN = ("glm4moe", "vllm/template_chatml")
"""The template ends a turn only if another follows; the row gets the token that would follow."""
NO_STOP_TOKEN = (
    "turns do not end in a special token, so the tuned model would not know where to stop"
)

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather in a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "Its name."}},
                "required": ["city"],
            },
        },
    }
]


def _chat(*contents: str, system: str | None = None) -> list[Message]:
    messages = [] if system is None else [Message("system", system, train=False)]
    for i, content in enumerate(contents):
        messages.append(Message("assistant" if i % 2 else "user", content, train=i % 2 == 1))
    return messages


def _call(city: str, number: int) -> list[Message]:
    call = ToolCall("weather", {"city": city}, f"call{number:05}")
    return [
        Message("assistant", "", train=True, tool_calls=(call,)),
        Message("tool", f"rain in {city}", False, name="weather", tool_call_id=call.id),
    ]


def _with_reasoning(messages: list[Message]) -> list[Message]:
    return [
        replace(m, reasoning=f"That is question {i}.") if m.train else m
        for i, m in enumerate(messages)
    ]


_CODE = "def f(x):\n    return [x, {'a': 1}]\n\n\nprint(f(\"é\"))  # 日本 🦊"
_SINGLE = [_chat("The capital of France?", "Paris."), _chat("Code?", _CODE), _chat(_CODE, "f")]
_MULTI = [
    _chat("The capital of France?", "Paris.", "And of Spain?", "Madrid."),
    _chat("a", "b", "a", "b", "c", "user", "assistant", "b"),
    _chat("One?", _CODE, "Two?", "2", "Three?", _CODE),
]
_CONVERSATIONS: dict[str, list[list[Message]]] = {
    "single": _SINGLE,
    "multi": _MULTI,
    "system": [[Message("system", "Be brief.", False), *m] for m in (_SINGLE[0], *_MULTI)],
    "early": [[replace(m, train=i == 1) for i, m in enumerate(turns)] for turns in _MULTI],
    "tools": [
        [*_chat("Weather in Oslo?"), *_call("Oslo", 1), Message("assistant", "It rains.", True)],
        [*_chat("Hi", "Hello.", 'Weather in "Rome"?'), *_call('"Rome"', 1)[:1]],
        [
            *_chat("Oslo and Rome?", system="Be brief."),
            *_call("Oslo", 1),
            *_call("Rome", 2),
            *_chat("", "It rains.", "Thanks", "Welcome.")[1:],
        ],
    ],
    "reasoning": [
        _with_reasoning(_SINGLE[0]),
        _with_reasoning(_MULTI[0]),
        _with_reasoning(_chat("a", "b", "c", "d", "e", "f", system="s")),
    ],
}
KINDS = list(_CONVERSATIONS)


def conversations(kind: str) -> list[Conversation]:
    """Return the conversations of a kind with which each template is tested."""
    tools = TOOLS if kind == "tools" else None
    return [Conversation(messages, tools=tools) for messages in _CONVERSATIONS[kind]]


def folder() -> Path | None:
    """Return TRL's folder of templates, without importing TRL, which would import a trainer."""
    found = find_spec("trl")
    if found is None or not found.submodule_search_locations:
        return None
    return Path(found.submodule_search_locations[0]) / "chat_templates"


def names() -> list[str]:
    """Return the templates that models have; those patched for training are left out.

    Templates that ask for reasoning by themselves are also tested without it.
    """
    where = folder()
    stems = sorted(path.stem for path in where.glob("*.jinja")) if where else []
    stems = [stem for stem in stems if not stem.endswith("_training")]
    return stems + [f"{stem}{_NO_THINKING}" for stem in stems if stem.startswith("nemotron")]


def packages() -> dict[str, Path]:
    """Return the templates below the folder in QLORA_TEMPLATES, each as `package/template`.

    Each package is a subfolder, as `pip install --no-deps --target` makes it.
    """
    where = os.environ.get("QLORA_TEMPLATES")
    if not where:
        return {}
    found = {}
    for path in sorted(Path(where).rglob("*.jinja")):
        package = path.relative_to(where).parts[:-1][:1]
        found["/".join([*package, path.stem])] = path
    return found


def _of(table: Any, name: str) -> Any:
    """Return the longest key with which a template's name begins, without its package."""
    model = name.rpartition("/")[2].removeprefix("template_")
    found = [key for key in table if model.startswith(key)]
    return max(found, key=len) if found else None


def tokenizer_for(name: str) -> Any:
    """Make a byte-level tokenizer with a template and the special tokens that it writes."""
    stem = name.removesuffix(_NO_THINKING)
    if "/" in name:
        path = packages()[name]
    else:
        where = folder()
        assert where is not None
        path = where / f"{stem}.jinja"
    source = path.read_text(encoding="utf-8")
    if stem != name:
        source = "{% set enable_thinking = false %}" + source
    bos, eos = _ENDS[_of(_ENDS, name)]
    tokenizer = make_tokenizer(source)
    tokenizer.add_special_tokens(
        {"eos_token": eos, "pad_token": eos, **({"bos_token": bos} if bos else {})}
    )
    tokenizer.add_tokens(sorted(set(_ADDED.findall(source))), special_tokens=True)
    return tokenizer


def by_hand(name: str, tokenizer: Any, row: Conversation, end: int, **options: Any) -> list[int]:
    """Tokenize the first `end` messages of a row with `apply_chat_template` itself."""
    turns = []
    for message in row.messages[:end]:
        content: Any = message.content
        if _of(_IN_PARTS, name):
            content = [{"type": "text", "text": content}]
        turn = {"role": message.role, "content": content}
        if message.reasoning is not None:
            keys = ("reasoning_content", "reasoning", "thinking")
            turn |= dict.fromkeys(keys, message.reasoning)
        if message.tool_calls:
            turn["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {
                        "name": call.name,
                        "arguments": json.dumps(call.arguments, ensure_ascii=False)
                        if _of(_JSON_ARGUMENTS, name)
                        else call.arguments,
                    },
                }
                for call in message.tool_calls
            ]
        if message.role == "tool":
            turn |= {"name": message.name, "tool_call_id": message.tool_call_id}
        turns.append(turn)
    ids = tokenizer.apply_chat_template(
        turns,
        tools=row.tools,
        tokenize=True,
        return_dict=False,
        # Rows are made as if every day had the same date.
        chat_template=re.sub(
            r"strftime_now\(['\"](.*?)['\"]\)",
            lambda found: repr(date(2024, 7, 26).strftime(found[1])),
            tokenizer.chat_template,
        ),
        **options,
    )
    assert isinstance(ids, list)
    return ids


def pieces(layout: RenderedRow, tokenizer: Any) -> list[str]:
    """Return the supervised text of a row: each turn with its stop token."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values()]
    found = []
    for answer in layout.answers:
        here = [token for token in added if layout.text.startswith(token, answer.stop)]
        end = answer.stop + max(map(len, here)) if here else answer.end
        found.append(layout.text[answer.start : end])
    return found


def check(name: str, tokenizer: Any, row: Conversation, layout: RenderedRow) -> None:
    """Assert that a row is what the model sees, and its supervised text what it has to write."""

    def ids(text: str) -> list[int]:
        found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    def hand(end: int, **options: Any) -> list[int]:
        return by_hand(name, tokenizer, row, end, **options)

    length, whole = len(row.messages), ids(layout.text)
    trained = [i for i, message in enumerate(row.messages) if message.train]
    texts = pieces(layout, tokenizer)
    added = [token.content for token in tokenizer.added_tokens_decoder.values()]
    prompt = hand(trained[-1], add_generation_prompt=True)
    if name in NO_REASONING_KEPT:
        # The template removes reasoning even from the last turn, and the prompt opens with it.
        assert whole == prompt + ids(texts[-1])
        opened = tokenizer.decode(prompt).removesuffix("<think>\n")
        answer = texts[-1].partition("</think>\n\n")[2]
        assert ids(opened + answer) == hand(length)
    elif name in NO_END_OF_TURN:
        assert (whole[:-1] if row.messages[-1].train else whole) == hand(length)
    else:
        assert whole == hand(length)
    assert whole.count(tokenizer.bos_token_id) <= 1 or name == "smolvlm"
    for i, answer, text in zip(trained, layout.answers, texts, strict=True):
        message = row.messages[i]
        prompt = hand(i, add_generation_prompt=True)
        assert ids(layout.text[: answer.start]) == prompt == whole[: len(prompt)]
        last = whole[len(prompt) : len(prompt) + len(ids(text))][-1]
        assert last in tokenizer.added_tokens_decoder, "no stop token is supervised"
        if not message.tool_calls:
            body = text
            # Several tokens may end a turn.
            while found := [stop for stop in added if body.endswith(stop)]:
                body = body.removesuffix(max(found, key=len)).rstrip()
            assert body.endswith(message.content.strip())
            before = body.removesuffix(message.content.strip())
            assert (message.reasoning or "") in before
            # Apart from the reasoning, the template puts only its marks before the content.
            assert not _MARKS.sub("", before.replace(message.reasoning or "", "")).strip()
        for call in message.tool_calls:
            assert call.name in text
        # At inference this turn is the last: the template writes the same.
        alone = hand(i + 1)[len(prompt) :]
        short = ids(text)
        if tokenizer.eos_token_id in _of_every_turn(name, tokenizer, row, i, len(prompt)):
            assert last == tokenizer.eos_token_id, "EOS ends every turn, and is not supervised"
        empty = re.compile(r"^\s*<think>\s*</think>\s*")
        assert (
            alone[: len(short)] == short
            or alone == short[: len(alone)]
            or name in NO_REASONING_KEPT
            or ids(empty.sub("", tokenizer.decode(alone)))[: len(short)] == short
        )


def _of_every_turn(name: str, tokenizer: Any, row: Conversation, i: int, start: int) -> list[int]:
    """Return what the template writes for turn `i`, whether the conversation continues or not."""
    turns = [*row.messages[: i + 1], Message("user", "a", train=False)]
    ends = i + 1, i + 2
    try:
        short, long = (by_hand(name, tokenizer, replace(row, messages=turns), end) for end in ends)
    except TemplateError:
        return []
    pairs = zip(short, long, strict=False)
    same = next((k for k, (a, b) in enumerate(pairs) if a != b), len(short))
    return short[start:same]


def outcomes(name: str) -> dict[str, dict[str, Any]]:
    """Return the outcome for the conversations of each kind, with the reason if it is not exact.

    Without a stop token, `qlora train` refuses the rows when it prepares them.
    """
    tokenizer = tokenizer_for(name)
    added = tuple(token.content for token in tokenizer.added_tokens_decoder.values())
    renderer = Renderer(tokenizer)
    found: dict[str, dict[str, Any]] = {}
    for kind in KINDS:
        try:
            rows = [
                (row, renderer.render(row))
                for conversation in conversations(kind)
                for row in renderer.split(conversation)
            ]
        except DataError as error:
            found[kind] = {"outcome": "refused", "reason": str(error)}
            continue
        texts = [pieces(layout, tokenizer) for _, layout in rows]
        if not all(text.endswith(added) for row_texts in texts for text in row_texts):
            reason = {"outcome": "no stop token", "reason": NO_STOP_TOKEN}
            found[kind] = {**reason, "supervised": texts}
            continue
        for row, layout in rows:
            check(name, tokenizer, row, layout)
        found[kind] = {
            "outcome": "exact",
            "conversations": len(conversations(kind)),
            "rows": len(rows),
            "supervised": texts,
        }
    return found
