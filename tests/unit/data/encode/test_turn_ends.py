"""Supervision ends at the token at which generation ends, however a turn is closed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from transformers import PreTrainedTokenizerFast

from qlora_cli.data.encode.encoder import Encoder
from qlora_cli.data.encode.truncate import EncodedRow
from qlora_cli.data.render.renderer import Renderer
from qlora_cli.errors import DataError
from qlora_cli.types import IGNORE_INDEX, Conversation, Message

TokenizerMaker = Callable[..., PreTrainedTokenizerFast]

TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' + (OPEN if m.role == 'assistant' else '') + "
    "m.content + (CLOSE if m.role == 'assistant' else '<|eot_id|>') }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' + OPEN }}{% else %}{{ LAST }}{% endif %}"
)

# What ends a turn, what follows the last turn, and what of both is supervised.
CLOSED = {
    "one token": ("<|end|>", "", "<|end|>"),
    "EOS": ("</s>", "", "</s>"),
    "a token and EOS": ("<|end|></s>", "", "<|end|></s>"),
    "with line breaks": ("<|end|>\n</s>\n", "", "<|end|>\n</s>"),
    "three tokens": ("<|end|><|im_end|></s>", "", "<|end|><|im_end|></s>"),
    "two tokens without EOS": ("<|end|><|im_end|>", "", "<|end|><|im_end|>"),
    "EOS first": ("</s><|end|>", "", "</s>"),
    "EOS in the middle": ("<|end|></s><|im_end|>", "", "<|end|></s>"),
    "a text and EOS": ("\n### End</s>", "", "\n### End</s>"),
    "a text between": ("<|end|> bye </s>", "", "<|end|> bye </s>"),
    "EOS after the last turn only": ("<|end|>", "</s>", "<|end|>"),
    "EOS in a line after the last turn only": ("<|end|>\n", "</s>", "<|end|>"),
    "EOS twice after the last turn": ("<|end|></s>", "</s>", "<|end|></s>"),
}  # fmt: skip


def tokenizer_of(
    make_tokenizer: TokenizerMaker, close: str, last: str = "", opening: str = ""
) -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer()
    source = TEMPLATE.replace("CLOSE", repr(close)).replace("LAST", repr(last))
    tokenizer.chat_template = source.replace("OPEN", repr(opening))
    return tokenizer


def turns(*contents: str, trained: tuple[int, ...] | None = None) -> list[Message]:
    return [
        Message(
            "assistant" if i % 2 else "user", text, i % 2 == 1 if trained is None else i in trained
        )
        for i, text in enumerate(contents)
    ]


def supervised(tokenizer: PreTrainedTokenizerFast, encoded: EncodedRow) -> str:
    [example] = encoded.examples
    return str(tokenizer.decode([label for label in example.labels if label != IGNORE_INDEX]))


@pytest.mark.parametrize("kind", CLOSED)
def test_a_turn_is_supervised_up_to_the_token_that_ends_generation(
    make_tokenizer: TokenizerMaker, kind: str
) -> None:
    close, last, expected = CLOSED[kind]
    tokenizer = tokenizer_of(make_tokenizer, close, last)
    encoder = Encoder(tokenizer)
    single = encoder.encode(turns("a", "Paris"), max_length=99)
    assert supervised(tokenizer, single) == f"Paris{expected}"
    multi = encoder.encode(turns("a", "Paris", "b", "answer", "c", "Paris"), max_length=99)
    assert supervised(tokenizer, multi) == f"Paris{expected}answer{expected}Paris{expected}"
    early = encoder.encode(turns("a", "Paris", "b", "answer", trained=(1,)), max_length=99)
    assert supervised(tokenizer, early) == f"Paris{expected}"
    added = tokenizer.added_tokens_decoder
    for end in [*single.turn_ends, *multi.turn_ends, *early.turn_ends]:
        found = [added[token].content for token in end.token_ids]
        assert found
        assert expected.endswith(found[-1])
        # The first of them ends generation here, the last everywhere.
        assert expected.replace(" bye ", "").replace("\n### End", "").split() == (
            ["".join(found)] if "\n</s>" not in expected else found
        )


def test_an_opening_that_the_model_is_given_is_not_supervised(
    make_tokenizer: TokenizerMaker,
) -> None:
    """Command A has `<|START_RESPONSE|>` in the prompt, and two tokens end the turn."""
    tokenizer = tokenizer_of(make_tokenizer, "<|end|></s>", opening="<|im_start|>")
    encoded = Encoder(tokenizer).encode(turns("a", "Paris", "b", "c"), max_length=99)
    assert supervised(tokenizer, encoded) == "Paris<|end|></s>c<|end|></s>"


def test_a_template_that_refuses_to_continue_ends_where_it_ends(
    make_tokenizer: TokenizerMaker,
) -> None:
    tokenizer = tokenizer_of(make_tokenizer, "<|end|>", "</s>")
    tokenizer.chat_template += "{% if messages|length > 2 %}{{ raise_exception('one') }}{% endif %}"
    encoded = Encoder(tokenizer).encode(turns("a", "Paris"), max_length=99)
    assert supervised(tokenizer, encoded) == "Paris<|end|></s>"


REWRITES = {
    "reasoning is removed": "{{ m.content.split('</think>')[-1] if not loop.last else m.content }}",
    "another ending": "{{ m.content + ('' if loop.last else ' ') }}",
    "another beginning": "{{ ('' if loop.last else ' ') + m.content }}",
}


@pytest.mark.parametrize("trained", [(1,), (1, 3), (3,), (1, 5), (1, 3, 5)])
@pytest.mark.parametrize("kind", REWRITES)
def test_an_early_answer_is_supervised_as_the_last_of_its_row(
    make_tokenizer: TokenizerMaker, kind: str, trained: tuple[int, ...]
) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>' }}{% if m.role == 'assistant' %}"
        + REWRITES[kind]
        + "{{ '<|end|></s>' }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    thought = "why</think>" if kind == "reasoning is removed" else ""
    answers = [f"{thought}{word}" for word in ("Paris", "answer", "capital")]
    messages = turns("a", answers[0], "b", answers[1], "c", answers[2], trained=trained)
    renderer = Renderer(tokenizer)
    rows = renderer.split(Conversation(messages))
    assert [len(row.messages) for row in rows] == [i + 1 for i in trained]
    for row, i in zip(rows, trained, strict=True):
        layout = renderer.render(row)
        [answer] = layout.answers
        assert layout.text[answer.start :] == f"{messages[i].content}<|end|></s>"


def test_a_conversation_that_no_row_can_hold_keeps_its_reason(
    make_tokenizer: TokenizerMaker,
) -> None:
    tokenizer = make_tokenizer("chatml")
    tokenizer.chat_template = tokenizer.chat_template.replace("m.content", "m.content | upper")
    conversation = Conversation(turns("A", "b", "C", "D", trained=(1,)))
    renderer = Renderer(tokenizer)
    assert renderer.split(conversation) == [conversation]
    with pytest.raises(DataError, match="changes or omits its content"):
        renderer.render(conversation)
