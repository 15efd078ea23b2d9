"""The encoder supervises exactly the answers and the tokens that end them."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from qlora_cli.data.config import Data
from qlora_cli.data.encode.encoder import Encoder
from qlora_cli.data.formats import FormatConfig, Messages, PromptCompletion, Text
from qlora_cli.data.prepared.prepare import PreparedData, prepare_prompts
from qlora_cli.data.prepared.prepare import prepare as prepare_sources
from qlora_cli.data.render.chat_template import read_chat_template
from qlora_cli.data.sources import Source
from qlora_cli.errors import DataError
from qlora_cli.models.base import BaseModelConfig
from qlora_cli.types import IGNORE_INDEX, Example, Message
from tests.conftest import MODEL, needs_model
from tests.conftest import make_tokenizer as make_bare

TokenizerMaker = Callable[..., PreTrainedTokenizerFast]
FORMATS = get_args(get_args(FormatConfig)[0])

SYSTEM = Message("system", "Answer in a word.", train=False)
TURNS = [
    Message("user", "The capital of France?", train=False),
    Message("assistant", "Paris.", train=True),
    Message("user", "And 6 × 7?\nQuick!", train=False),
    Message("assistant", "The answer is 42 — the\n\nanswer, äöü 👍", train=True),
    Message("user", "Say <", train=False),
    Message("assistant", "<", train=True),
]
ANSWERS = [message.content for message in TURNS if message.train]
STOPS = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "mistral": "</s>", "phi3": "<|end|>"}


def chat(*contents: str) -> list[Message]:
    """Alternate user and assistant messages."""
    return [
        Message("assistant", content, train=True) if i % 2 else Message("user", content, False)
        for i, content in enumerate(contents)
    ]


def whole(messages: list[Message], tokenizer: PreTrainedTokenizerFast, **options: Any) -> list[int]:
    """Tokenize a conversation with transformers."""
    turns = [{"role": m.role, "content": m.content} for m in messages]
    ids: list[int] = tokenizer.apply_chat_template(turns, return_dict=False, **options)
    return ids


def supervised_text(example: Example, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Return the text of each supervised span."""
    assert all(
        label in (token, IGNORE_INDEX)
        for token, label in zip(example.input_ids, example.labels, strict=True)
    )
    spans: list[list[int]] = []
    previous = IGNORE_INDEX
    for label in example.labels:
        if label != IGNORE_INDEX:
            if previous == IGNORE_INDEX:
                spans.append([])
            spans[-1].append(label)
        previous = label
    return [tokenizer.decode(span) for span in spans]


def rows_file(folder: Path, rows: list[Any]) -> str:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(path)


def chat_source(folder: Path, *conversations: list[Message], **settings: Any) -> Source:
    rows = [
        {"messages": [{"role": m.role, "content": m.content} for m in messages]}
        for messages in conversations
    ]
    return Source(path=rows_file(folder, rows), format=Messages(), **settings)


def prepare(
    source: Source, tokenizer: PreTrainedTokenizerFast, folder: Path, **settings: Any
) -> PreparedData:
    return prepare_sources([source], tokenizer, Data(train=source, **settings), folder)


@pytest.mark.parametrize("with_system", [False, True])
@pytest.mark.parametrize("template", ["chatml", "llama3", "phi3"])
def test_answers_and_their_stop_tokens_are_supervised(
    make_tokenizer: TokenizerMaker, template: str, with_system: bool
) -> None:
    tokenizer = make_tokenizer(template)
    messages = [SYSTEM, *TURNS] if with_system else TURNS
    encoded = Encoder(tokenizer).encode(messages, max_length=4096)
    assert encoded.example.input_ids == whole(messages, tokenizer)
    stop = STOPS[template]
    assert supervised_text(encoded.example, tokenizer) == [answer + stop for answer in ANSWERS]
    stop_id = tokenizer.convert_tokens_to_ids(stop)
    assert [end.token_ids for end in encoded.turn_ends] == [(stop_id,)] * 3
    assert encoded.lost is None
    assert encoded.length == len(encoded.example.input_ids)


def test_a_template_without_headers(make_tokenizer: TokenizerMaker) -> None:
    tokenizer = make_tokenizer("mistral")
    example = Encoder(tokenizer).encode(TURNS, max_length=4096).example
    assert example.input_ids == whole(TURNS, tokenizer)
    # The model has to write the space: the prompt ends before it.
    assert supervised_text(example, tokenizer) == [f" {answer}</s>" for answer in ANSWERS]


def test_the_generation_prompt_begins_each_answer(tokenizer: PreTrainedTokenizerFast) -> None:
    example = Encoder(tokenizer).encode(TURNS, max_length=4096).example
    for i, message in enumerate(TURNS):
        if message.train:
            prompt = whole(TURNS[:i], tokenizer, add_generation_prompt=True)
            assert example.input_ids[: len(prompt)] == prompt
            assert example.labels[len(prompt) - 1] == IGNORE_INDEX
            assert example.labels[len(prompt)] != IGNORE_INDEX


def test_text_that_the_template_adds_to_an_answer_is_supervised(
    make_tokenizer: TokenizerMaker,
) -> None:
    tokenizer = make_tokenizer("reasoning")
    encoded = Encoder(tokenizer).encode(TURNS, max_length=4096)
    assert supervised_text(encoded.example, tokenizer) == [
        f"{ANSWERS[0]}<|im_end|>",
        f"{ANSWERS[1]}<|im_end|>",
        "<think>\n\n</think>\n\n<<|im_end|>",
    ]


def test_reasoning_that_is_removed_later_gets_its_own_row(
    make_tokenizer: TokenizerMaker,
) -> None:
    tokenizer = make_tokenizer("reasoning")
    reasoned = "<think>\nIt is in France.\n</think>\n\nParis."
    messages = chat("Capital?", reasoned, "Sure?", "Yes.")
    first, second = Encoder(tokenizer).encode(messages, max_length=4096).examples
    assert first.input_ids == whole(messages[:2], tokenizer)
    assert supervised_text(first, tokenizer) == [f"{reasoned}<|im_end|>"]
    assert second.input_ids == whole(messages, tokenizer)
    assert supervised_text(second, tokenizer) == ["<think>\n\n</think>\n\nYes.<|im_end|>"]


def test_a_prompt_that_differs_from_generation_is_refused(make_tokenizer: TokenizerMaker) -> None:
    # Each answer would be exact by itself, but the second one is not prompted like this.
    messages = chat("Capital?", "<think>\nFrance\n</think>\n\nParis.", "Sure?", "Yes.")
    messages[1] = Message("assistant", messages[1].content, train=False)
    tokenizer = make_tokenizer("reasoning")
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{{ '<|im_start|>' + m.role",
        "{% if loop.last and not add_generation_prompt %}!{% endif %}{{ '<|im_start|>' + m.role",
    )
    with pytest.raises(
        DataError, match=r"message 4 \(assistant\): its generation prompt is not a prefix"
    ):
        Encoder(tokenizer).encode(messages, max_length=4096)


def test_a_template_without_generation_prompt_is_refused(make_tokenizer: TokenizerMaker) -> None:
    with pytest.raises(DataError, match=r"no generation prompt.*<.im_start.>assistant"):
        Encoder(make_tokenizer("without_prompt")).encode(TURNS, max_length=4096)


def test_content_that_the_template_changes_is_refused(make_tokenizer: TokenizerMaker) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("m.content", "m.content | upper")
    with pytest.raises(DataError, match=r"message 2 .*changes or omits its content"):
        Encoder(tokenizer).encode(chat("a", "b"), max_length=64)


def test_an_answer_without_a_prompt_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match=r"message 1 \(assistant\): nothing precedes it"):
        Encoder(tokenizer).encode([TURNS[1], *TURNS], max_length=4096)


def test_a_template_that_refuses_is_reported_by_row(
    make_tokenizer: TokenizerMaker, tmp_path: Path
) -> None:
    source = chat_source(tmp_path, TURNS, [SYSTEM, *TURNS])
    with pytest.raises(DataError) as caught:
        prepare(source, make_tokenizer("mistral"), tmp_path, max_length=512, max_lost=0)
    assert str(caught.value) == (
        f"{source.path}: 1 bad row\n  {source.path}:2: the chat template refuses the "
        "conversation: only user and assistant roles are supported"
    )
    with pytest.raises(DataError, match=r"2 bad rows\n.*refuses the conversation"):
        prepare(source, make_tokenizer("failing"), tmp_path, max_length=512, max_lost=0)


def test_a_broken_or_missing_template_is_reported_once(
    make_tokenizer: TokenizerMaker, tmp_path: Path
) -> None:
    source = chat_source(tmp_path, TURNS, TURNS)
    with pytest.raises(DataError, match=r"^chat template, line 2: "):
        prepare(source, make_tokenizer("broken"), tmp_path, max_length=512, max_lost=0)
    with pytest.raises(DataError, match=r"^the tokenizer has no chat template") as caught:
        prepare(source, make_tokenizer(None), tmp_path, max_length=512, max_lost=0)
    assert caught.value.hint is not None
    assert "data.chat_template" in caught.value.hint


def test_verbatim_text_is_supervised_including_eos(make_tokenizer: TokenizerMaker) -> None:
    tokenizer = make_tokenizer(None)
    example = (
        Encoder(tokenizer).encode([Message("text", "a b ", train=True)], max_length=64).example
    )
    assert supervised_text(example, tokenizer) == ["a b </s>"]
    assert example.labels[-1] == tokenizer.eos_token_id == tokenizer.pad_token_id


def test_verbatim_prompt_and_completion_are_tokenized_together(
    make_tokenizer: TokenizerMaker,
) -> None:
    tokenizer = make_tokenizer(None)
    pieces = [Message("text", "The capital of", False), Message("text", " France is Paris.", True)]
    encoder = Encoder(tokenizer)
    example = encoder.encode(pieces, max_length=64).example
    text = "The capital of France is Paris."
    assert example.input_ids == [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    assert supervised_text(example, tokenizer) == [" France is Paris.</s>"]
    prompt = encoder.to_prompt(pieces)
    assert prompt.input_ids == tokenizer("The capital of")["input_ids"]
    assert prompt.reference == " France is Paris."


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("text", ["a b", "<s>a b", "<s>a b</s>"])
def test_at_most_one_bos_and_one_eos_around_text(
    make_tokenizer: TokenizerMaker, adds_bos: bool, text: str
) -> None:
    tokenizer = make_tokenizer(None, adds_bos=adds_bos)
    encoded = Encoder(tokenizer).encode([Message("text", text, train=True)], max_length=64)
    ids = encoded.example.input_ids
    bos_due = adds_bos or text.startswith("<s>")
    assert ids[0] == tokenizer.bos_token_id or not bos_due
    assert ids.count(tokenizer.bos_token_id) == bos_due
    assert ids.count(tokenizer.eos_token_id) == 1
    assert encoded.example.labels[-1] == ids[-1] == tokenizer.eos_token_id
    assert [end.token_ids for end in encoded.turn_ends] == [(tokenizer.eos_token_id,)]


def test_at_most_one_bos_in_conversations_and_prompts(make_tokenizer: TokenizerMaker) -> None:
    tokenizer = make_tokenizer("llama3", adds_bos=True)
    encoder = Encoder(tokenizer)
    verbatim = [Message("text", "a", train=False), Message("text", " b", train=True)]
    for ids in (
        encoder.encode(TURNS, max_length=4096).example.input_ids,
        encoder.to_prompt(TURNS).input_ids,
        encoder.to_prompt(verbatim).input_ids,
    ):
        assert ids[0] == tokenizer.bos_token_id
        assert ids.count(tokenizer.bos_token_id) == 1


def test_a_prompt_is_the_beginning_of_its_training_row(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [SYSTEM, *TURNS]
    prompt = Encoder(tokenizer).to_prompt(messages)
    assert prompt.input_ids == whole(messages[:-1], tokenizer, add_generation_prompt=True)
    row = Encoder(tokenizer).encode(messages, max_length=4096).example.input_ids
    assert row[: len(prompt.input_ids)] == prompt.input_ids
    assert prompt.reference == "<"


def test_a_truncated_row_keeps_its_beginning(tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = Encoder(tokenizer)
    full = encoder.encode(TURNS, max_length=4096)
    cut = encoder.encode(TURNS, max_length=full.length - 6)
    assert cut.example == Example(full.example.input_ids[:-6], full.example.labels[:-6])
    assert cut.length == full.length
    assert len(cut.turn_ends) == 2, "the end of the last turn is cut"
    assert encoder.encode(TURNS, max_length=full.length).turn_ends == full.turn_ends


@pytest.mark.parametrize("trim_offsets", [False, True])
def test_a_row_with_a_token_across_prompt_and_completion_is_lost(
    make_tokenizer: TokenizerMaker, trim_offsets: bool
) -> None:
    tokenizer = make_tokenizer(None)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    pieces = [Message("text", "The answer is ", False), Message("text", "the question", True)]
    lost = Encoder(tokenizer).encode(pieces, max_length=64).lost
    assert lost is not None
    assert "one token (' the') holds the end of the prompt (' ')" in lost


def lost_rows(
    tokenizer: PreTrainedTokenizerFast, folder: Path, num_long: int
) -> tuple[Source, int]:
    """Twenty rows, some with a question that leaves no room for the answer in `max_length`."""
    short, long = chat("a b", "Paris."), chat("a b c " * 50, "Paris.")
    max_length = len(whole(short, tokenizer)) + 5
    return chat_source(folder, *[long] * num_long, *[short] * (20 - num_long)), max_length


def test_rows_without_supervised_tokens_are_dropped_and_named(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source, max_length = lost_rows(tokenizer, tmp_path, 1)
    with caplog.at_level(logging.WARNING, "qlora"):
        prepared = prepare(source, tokenizer, tmp_path, max_length=max_length, max_lost=0.05)
    assert (prepared.num_rows, prepared.num_lost, len(prepared.examples)) == (20, 1, 19)
    assert prepared.num_truncated == 1
    length = len(whole(chat("a b c " * 50, "Paris."), tokenizer))
    assert f"{source.path}:1: {length} tokens, data.max_length {max_length}: 1 of 1 " in caplog.text


@pytest.mark.parametrize(("num_long", "max_lost"), [(2, 0.05), (20, 1.0)])
def test_too_many_lost_rows_stop_the_run(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, num_long: int, max_lost: float
) -> None:
    source, max_length = lost_rows(tokenizer, tmp_path, num_long)
    with pytest.raises(DataError, match=rf"{num_long} of 20 answers are lost.*max_lost"):
        prepare(source, tokenizer, tmp_path, max_length=max_length, max_lost=max_lost)


def test_turns_without_a_stop_token_stop_the_run(
    make_tokenizer: TokenizerMaker, tmp_path: Path
) -> None:
    source = chat_source(tmp_path, chat("a", "b"), chat("a", "b", "c", "d"))
    tokenizer = make_tokenizer("without_stop")
    example = Encoder(tokenizer).encode(chat("a", "b"), max_length=512).example
    assert supervised_text(example, tokenizer) == [" b"]
    with pytest.raises(
        DataError, match=r"3 of 3 supervised turns do not end in an added token.*'\\n'"
    ):
        prepare(source, tokenizer, tmp_path, max_length=512, max_lost=0)


def test_a_few_turns_without_a_stop_token_are_tolerated(
    make_tokenizer: TokenizerMaker, tmp_path: Path
) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "m.content + '<|im_end|>", "m.content + ('' if m.content == 'odd' else '<|im_end|>') + '"
    )
    good, odd = chat("a", "b"), chat("a", "odd")
    source = chat_source(tmp_path, *[good] * 99, odd)
    assert prepare(source, tokenizer, tmp_path, max_length=64, max_lost=0).num_rows == 100
    source = chat_source(tmp_path, *[good] * 98, odd, odd)
    with pytest.raises(DataError, match="2 of 100 supervised turns"):
        prepare(source, tokenizer, tmp_path, max_length=64, max_lost=0)


def test_the_counts_of_prepared_data(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    source = chat_source(tmp_path, TURNS, chat("a", "b"))
    prepared = prepare(source, tokenizer, tmp_path, max_length=512, max_lost=0)
    lengths = [len(whole(m, tokenizer)) for m in (TURNS, chat("a", "b"))]
    assert prepared.num_tokens == sum(lengths)
    assert prepared.num_supervised == sum(e.num_supervised for e in prepared.examples) > 0
    assert prepared.stop_token_ids == [tokenizer.convert_tokens_to_ids("<|im_end|>")]
    assert prepared.summary().endswith(f"longest {max(lengths)}; turns end with <|im_end|>")
    record = json.loads(json.dumps(prepared.record()))
    assert record["digest"] == source.digest()
    assert "examples" not in record


@pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: kind.__name__)
def test_every_format_can_be_trained_on(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, kind: Any
) -> None:
    source = Source(path=rows_file(tmp_path, [kind.example] * 3), format=kind())
    prepared = prepare(source, tokenizer, tmp_path, max_length=512, max_lost=0)
    row = kind().to_conversation(kind.example)
    stop = "</s>" if row.messages[0].role == "text" else "<|im_end|>"
    answers = [
        [message.content + stop for message in messages if message.train]
        for messages in (row.messages, row.rejected)
        if messages is not None
    ]
    if kind.rows == "labels":  # the label is read at the last token
        answers = [[stop]]
    assert [supervised_text(example, tokenizer) for example in prepared.examples] == answers * 3


def test_prompts_of_a_source(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    source = chat_source(tmp_path, TURNS, chat("a", "b"))
    prompts = prepare_prompts(source, tokenizer)
    encoder = Encoder(tokenizer)
    expected = [encoder.to_prompt(TURNS), encoder.to_prompt(chat("a", "b"))]
    assert [p.input_ids for p in prompts] == [p.input_ids for p in expected]
    assert [p.reference for p in prompts] == [p.reference for p in expected]
    assert [p.place.rpartition(":")[2] for p in prompts] == ["1", "2"]
    assert prompts[1].text == tokenizer.decode(expected[1].input_ids)
    assert prepare_prompts(source, tokenizer, limit=1) == prompts[:1]


def test_plain_text_has_no_prompt(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    source = Source(path=rows_file(tmp_path, [Text.example]), format=Text())
    with pytest.raises(DataError, match=r"rows.jsonl:1: the row begins with its answer"):
        prepare_prompts(source, tokenizer)


def test_reading_a_chat_template(tmp_path: Path) -> None:
    path = tmp_path / "template.jinja"
    path.write_text("{{ 'ä' }}", encoding="utf-8")
    assert read_chat_template(str(path)) == "{{ 'ä' }}"
    assert read_chat_template(None) is None
    with pytest.raises(DataError, match=r"data.chat_template: .*missing.jinja: No such file"):
        read_chat_template(str(tmp_path / "missing.jinja"))
    path.write_bytes(b"\xff")
    with pytest.raises(DataError, match="not UTF-8"):
        read_chat_template(str(path))


def test_rows_do_not_depend_on_the_date() -> None:
    dated = "{{ strftime_now('%d %b %Y') }}\n"
    turns = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    tokenizer = make_bare(dated + turns)
    encoded = Encoder(tokenizer).encode(TURNS, max_length=4096)
    assert tokenizer.decode(encoded.example.input_ids).startswith("26 Jul 2024\n")


@pytest.mark.slow
@needs_model
def test_the_demo_models_tokenizer() -> None:
    tokenizer = BaseModelConfig(path=str(MODEL)).load_tokenizer()
    for messages in (TURNS, [SYSTEM, *TURNS]):
        encoded = Encoder(tokenizer).encode(messages, max_length=4096)
        assert encoded.example.input_ids == whole(messages, tokenizer)
        assert supervised_text(encoded.example, tokenizer) == [
            f"{text}<|im_end|>" for text in ANSWERS
        ]
    as_text = PromptCompletion(as_chat=False).to_conversation(PromptCompletion.example).messages
    encoded = Encoder(tokenizer).encode(as_text, max_length=64)
    assert supervised_text(encoded.example, tokenizer) == [" Paris." + tokenizer.eos_token]
