"""Prepare rows: truncate them, count losses, cache the result and read it back."""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from qlora_cli.data.config import Data
from qlora_cli.data.encode.encoder import Encoder
from qlora_cli.data.encode.truncate import EncodedRow, Truncate
from qlora_cli.data.prepared import cache
from qlora_cli.data.prepared.cache import load_or_prepare
from qlora_cli.data.prepared.mmap_dataset import DatasetWriter, MmapDataset, read_facts
from qlora_cli.data.prepared.prepare import PreparedData, prepare
from qlora_cli.data.prepared.tally import TooManyLost
from qlora_cli.data.prepared.workers import Workers
from qlora_cli.data.sources import BadRows, LocatedRow, Portion, Source
from qlora_cli.errors import DataError
from qlora_cli.types import IGNORE_INDEX, Conversation, Example, Message
from tests.damage import DAMAGE

TokenizerMaker = Callable[..., PreTrainedTokenizerFast]

QUESTION = Message("user", "a b c " * 20, train=False)
ANSWER = Message("assistant", "Paris is the capital.", train=True)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write rows of one question and answer, or of a text, and return the file."""

    def write(*texts: str | tuple[str, str], name: str = "rows.jsonl") -> Path:
        rows = [
            {"text": text} if isinstance(text, str) else dict(zip("qa", text, strict=True))
            for text in texts
        ]
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


def chat_data(path: Path, **settings: Any) -> Data:
    form = {"type": "prompt_completion", "prompt_field": "q", "completion_field": "a"}
    return Data.model_validate({"train": {"path": str(path), "format": form}, **settings})


def text_data(path: Path, **settings: Any) -> Data:
    return Data.model_validate(
        {"train": {"path": str(path), "format": {"type": "text"}}, "max_length": 16, **settings}
    )


def make(data: Data, tokenizer: PreTrainedTokenizerFast, folder: Path) -> PreparedData:
    folder.mkdir()
    return prepare(data.train_sources, tokenizer, data, folder)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_dataset_round_trips(tmp_path: Path) -> None:
    examples = [Example([5, 6, 7], [IGNORE_INDEX, 6, 7]), Example([2**31 - 1], [IGNORE_INDEX])]
    with DatasetWriter(tmp_path) as writer:
        for source, example in enumerate(examples):
            writer.add(example, source, f"ä/rows.jsonl:{source + 1}")
        assert read_facts(tmp_path) is None, "not whole before it is closed"
        writer.close({"note": "x"})
    read = MmapDataset(tmp_path)
    assert list(read) == examples
    assert (read[-1], read[0:1]) == (examples[1], examples[:1])
    with pytest.raises(IndexError):
        read[2]
    assert read.lengths.tolist() == [3, 1]
    assert [read.source(i) for i in range(2)] == [0, 1]
    assert read.place(1) == "ä/rows.jsonl:2"
    assert read_facts(tmp_path) == {"note": "x"}
    (tmp_path / "supervised.bin").write_bytes(b"\0")
    assert read_facts(tmp_path) is None


def test_the_digest_depends_on_labels_order_and_source_but_not_on_place(tmp_path: Path) -> None:
    supervised, shown = Example([5, 6], [IGNORE_INDEX, 6]), Example([5, 6], [IGNORE_INDEX] * 2)
    sets = [
        [(supervised, 0), (shown, 0)], [(shown, 0), (supervised, 0)], [(supervised, 0)] * 2,
        [(supervised, 0), (shown, 1)], [(supervised, 0)],
        [(Example([5, 6, 5, 6], [IGNORE_INDEX, 6, IGNORE_INDEX, IGNORE_INDEX]), 0)],
    ]  # fmt: skip
    sums = []
    for place in ("a", "b"):
        for examples in sets:
            with DatasetWriter(tmp_path) as writer:
                for example, source in examples:
                    writer.add(example, source, place)
                sums.append(writer.digest)
    assert sums[: len(sets)] == sums[len(sets) :], "the place of a row is not part of the digest"
    assert len(set(sums)) == len(sets)


def cut(
    tokenizer: PreTrainedTokenizerFast, truncate: Truncate, max_length: int
) -> tuple[Example, Any]:
    encoder = Encoder(tokenizer)
    whole = encoder.encode([QUESTION, ANSWER], max_length=4096).example
    return whole, encoder.encode([QUESTION, ANSWER], max_length=max_length, truncate=truncate)


def test_drop_leaves_long_rows_out(tokenizer: PreTrainedTokenizerFast) -> None:
    whole, encoded = cut(tokenizer, "drop", 40)
    assert encoded.examples == []
    assert (encoded.length, encoded.num_lost) == (len(whole.input_ids), 1)
    assert encoded.lost.endswith("data.max_length 40: left out")
    assert cut(tokenizer, "drop", len(whole.input_ids))[1].example == whole


def test_cut_prompt_keeps_the_answer_and_bos(make_tokenizer: TokenizerMaker) -> None:
    tokenizer = make_tokenizer("llama3")
    whole, encoded = cut(tokenizer, "cut_prompt", 30)
    assert encoded.example.input_ids == [tokenizer.bos_token_id, *whole.input_ids[-29:]]
    assert encoded.example.num_supervised == whole.num_supervised
    assert encoded.lost is None
    assert [end.text for end in encoded.turn_ends] == ["<|eot_id|>"]


def test_cut_prompt_drops_a_bos_that_opens_turns(make_tokenizer: TokenizerMaker) -> None:
    tokenizer = make_tokenizer()
    tokenizer.bos_token = "<|im_start|>"
    whole, encoded = cut(tokenizer, "cut_prompt", 30)
    assert whole.input_ids[0] == tokenizer.bos_token_id
    assert encoded.example.input_ids == whole.input_ids[-30:]
    assert encoded.lost is None


def test_cut_prompt_cuts_an_answer_that_is_too_long_at_its_end(
    make_tokenizer: TokenizerMaker,
) -> None:
    tokenizer = make_tokenizer("llama3")
    whole, encoded = cut(tokenizer, "cut_prompt", 8)
    first = next(i for i, label in enumerate(whole.labels) if label != IGNORE_INDEX)
    # One token of the prompt is left, so that the answer can be predicted.
    assert encoded.example.input_ids == [
        tokenizer.bos_token_id,
        *whole.input_ids[first - 1 : first + 6],
    ]
    assert encoded.example.num_supervised == 6
    assert encoded.num_lost == 1


def test_split_supervises_each_token_of_a_text_once(make_tokenizer: TokenizerMaker) -> None:
    encoder = Encoder(make_tokenizer(None, adds_bos=True))
    text = [Message("text", "a b c " * 20, train=True)]
    whole = encoder.encode(text, max_length=4096).example
    for max_length in (8, len(whole.input_ids) - 1, len(whole.input_ids)):
        encoded = encoder.encode(text, max_length=max_length, truncate="split")
        supervised = [t for one in encoded.examples for t in one.labels[1:] if t != IGNORE_INDEX]
        assert supervised == whole.input_ids[1:]
        assert all(len(one.input_ids) <= max_length for one in encoded.examples)
        assert (encoded.lost, encoded.num_lost) == (None, 0)


def test_split_cuts_a_conversation_at_its_end(tokenizer: PreTrainedTokenizerFast) -> None:
    whole, _ = cut(tokenizer, "split", 4096)
    shorter = len(whole.input_ids) - 6
    encoded = cut(tokenizer, "split", shorter)[1]
    assert encoded.example == cut(tokenizer, "cut_end", shorter)[1].example
    assert encoded.num_lost == 1


def test_a_fully_supervised_conversation(tokenizer: PreTrainedTokenizerFast) -> None:
    encoded = Encoder(tokenizer).encode([QUESTION, ANSWER], max_length=4096, train_on_all=True)
    assert encoded.example.labels == encoded.example.input_ids


def test_lost_answers_are_counted_and_named(
    tokenizer: PreTrainedTokenizerFast,
    write: Callable[..., Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = write(*[("a", "b")] * 9, ("a", "b " * 40))
    with caplog.at_level(logging.WARNING, "qlora"):
        prepared = make(chat_data(path, max_length=40, max_lost=0.1), tokenizer, tmp_path / "set")
    assert (prepared.num_rows, prepared.num_truncated, prepared.num_lost) == (10, 1, 0)
    assert (prepared.num_answers, prepared.num_lost_answers) == (10, 1)
    assert "1 of 10 answers lost" in prepared.summary()
    assert f"{path}:10: " in caplog.text
    with pytest.raises(DataError) as caught:
        make(chat_data(path, max_length=40, max_lost=0.05), tokenizer, tmp_path / "other")
    lines = str(caught.value).splitlines()
    assert lines[0] == (
        f"{path}: 1 of 10 answers are lost, in 1 of 10 rows; data.max_lost allows 5.0%"
    )
    assert lines[1].startswith(f"  {path}:10: ")
    assert lines[1].endswith("tokens, data.max_length 40: 1 of 1 answers cut")


def test_the_advice_about_lost_answers_gives_lengths_that_are_enough(
    tokenizer: PreTrainedTokenizerFast, write: Callable[..., Path], tmp_path: Path
) -> None:
    path = write(*[("a", "b " * n) for n in range(1, 201)], ("a", "b " * 500))
    with pytest.raises(TooManyLost) as caught:
        make(chat_data(path, max_length=40), tokenizer, tmp_path / "set")
    found = re.search(
        r"max_length: (\d+) keeps every row whole, (\d+) keeps 99 %", caught.value.hint
    )
    assert found is not None
    for i, (length, kept) in enumerate(zip(map(int, found.groups()), (201, 199), strict=True)):
        for less in (0, 1):
            data = chat_data(path, max_length=length - less, truncate="drop", max_lost=1)
            examples = make(data, tokenizer, tmp_path / f"{i}{less}").examples
            assert (len(examples) == kept) is (less == 0)
    # Most rows are too long by more than their prompt.
    assert "the prompt of 15 of these rows" in caught.value.hint


def _talk(*texts: str) -> dict[str, Any]:
    """A conversation in which every second text is an answer."""
    roles = ("user", "assistant") * (len(texts) // 2)
    turns = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
    return {"messages": turns}


A_LONG_PROMPT, A_LONG_ANSWER = _talk("a " * 80, "b"), _talk("a", "b " * 80)
BOTH_LONG, MANY_TURNS = _talk("a " * 20, "b " * 80), _talk(*["a " * 5] * 18)


@pytest.mark.parametrize("truncate", ["cut_end", "drop", "split", "cut_prompt"])
@pytest.mark.parametrize(
    ("rows", "number"),
    [
        ([A_LONG_PROMPT] * 3, 3),
        ([A_LONG_PROMPT, A_LONG_ANSWER], 1),
        ([A_LONG_ANSWER] * 2, 0),
        ([BOTH_LONG], 0),
        ([MANY_TURNS] * 2, 0),  # the first answer follows almost at once
        ([MANY_TURNS, A_LONG_PROMPT], 1),
    ],
    ids=["long prompts", "one of two", "long answers", "both long", "many turns", "many and long"],
)
def test_cutting_prompts_is_advised_where_it_keeps_answers(
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    truncate: str,
    rows: list[Any],
    number: int,
) -> None:
    path, settings = tmp_path / "rows.jsonl", {"max_length": 60, "truncate": truncate}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = Data.model_validate({"train": {"path": str(path)}, "max_lost": 0, **settings})
    is_cut = truncate == "cut_prompt"
    if number == len(rows) and is_cut:
        assert make(data, tokenizer, tmp_path / "set").num_lost_answers == 0
        return
    with pytest.raises(TooManyLost) as caught:
        make(data, tokenizer, tmp_path / "set")
    hint = str(caught.value.hint)
    assert ("data.truncate: cut_prompt" in hint) == (number > 0 and not is_cut)
    some = f"the prompt of {number} of these rows (system message and tools first)"
    assert (some in hint) == (0 < number < len(rows) and not is_cut)


def test_lost_texts_are_reported_as_texts_and_may_be_split(
    tokenizer: PreTrainedTokenizerFast, write: Callable[..., Path], tmp_path: Path
) -> None:
    path = write("a", "b " * 40)
    with pytest.raises(TooManyLost) as caught:
        make(text_data(path), tokenizer, tmp_path / "stopped")
    head, line = str(caught.value).splitlines()
    assert head.startswith(f"{path}: 1 of 2 texts are cut or left out, in 1 of 2 rows; ")
    assert line.endswith(" tokens, data.max_length 16: cut")
    assert "data.truncate: split makes several rows" in str(caught.value.hint)
    prepared = make(text_data(path, max_lost=1), tokenizer, tmp_path / "cut")
    assert "1 of 2 texts lost" in prepared.summary()
    prepared = make(text_data(path, truncate="split"), tokenizer, tmp_path / "split")
    assert prepared.num_lost_answers == 0


@pytest.mark.parametrize("share", [None, 0.5])
def test_lost_answers_of_held_out_rows_are_reported_as_held_out(
    tokenizer: PreTrainedTokenizerFast,
    write: Callable[..., Path],
    tmp_path: Path,
    share: float | None,
) -> None:
    path = write(*[("a", "b " * n) for n in range(40, 46)])
    data = chat_data(path, max_length=40, evaluation_share=share)
    if share is None:
        data = Data.model_validate({**data.model_dump(), "evaluation": data.train.model_dump()})
    with pytest.raises(
        TooManyLost, match=r"(\d) of \1 answers are lost, in \1 of \1 held-out rows;"
    ):
        prepare(data.evaluation_sources, tokenizer, data, tmp_path)
    with pytest.raises(TooManyLost, match=r"in (\d) of \1 rows;"):
        prepare(data.train_sources, tokenizer, data, tmp_path)


def test_bad_rows_are_left_out_and_counted(
    tokenizer: PreTrainedTokenizerFast, write: Callable[..., Path], tmp_path: Path
) -> None:
    path = write(("a", "b"), ("a", ""), ("c", "d"))
    with pytest.raises(DataError, match=r"1 bad row\n.*rows.jsonl:2: "):
        make(chat_data(path), tokenizer, tmp_path / "stopped")
    prepared = make(chat_data(path, on_bad_row="skip"), tokenizer, tmp_path / "skipped")
    assert (prepared.num_rows, prepared.num_bad, len(prepared.examples)) == (2, 1, 2)
    assert "), 1 bad row left out, " in prepared.summary()
    assert [prepared.examples.place(i) for i in range(2)] == [f"{path}:1", f"{path}:3"]


@pytest.mark.parametrize("share", [None, 0.4])
def test_lines_that_a_quotation_mark_swallows_are_counted_with_the_bad_rows(
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    share: float | None,
) -> None:
    path = tmp_path / "reviews.csv"
    lines = [f"Frage {i};Label" for i in range(300)]
    lines[50] = '"offen;Label'
    lines[90] = '"wieder zu";"a" b;Label'
    lines[200] = "zu;viele;Felder"
    path.write_text("\ufeffNachricht;Kategorie\n" + "\n".join(lines) + "\n", encoding="utf-8")
    columns = {"prompt_field": "Nachricht", "completion_field": "Kategorie"}
    source = {
        "path": str(path),
        "delimiter": ";",
        "format": {"type": "prompt_completion", **columns},
    }
    data = Data.model_validate(
        {"train": source, "on_bad_row": "skip", "max_lost": 1, "evaluation_share": share}
    )
    sides = []
    for name in ("train_sources", "evaluation_sources")[: 1 if share is None else 2]:
        (tmp_path / name).mkdir()
        sides.append(prepare(getattr(data, name), tokenizer, data, tmp_path / name))
    bad, swallowed = sum(side.num_bad for side in sides), sum(side.num_swallowed for side in sides)
    assert (bad, swallowed) == (2, 40)
    assert sum(side.num_rows for side in sides) + bad + swallowed == 300
    said = "40 further lines swallowed by quotation marks"
    assert sum(f"and {said}, " in side.summary() for side in sides) == 1
    assert sum(f" left out; {said}\n" in text for text in caplog.messages) == 1


@pytest.mark.parametrize("seed", range(5))
def test_the_bad_rows_of_a_file_are_one_list_although_some_of_its_rows_are_held_out(
    make_tokenizer: TokenizerMaker, tmp_path: Path, caplog: pytest.LogCaptureFixture, seed: int
) -> None:
    """Rows that cannot be read, formatted or rendered are named together, in one portion each."""
    tokenizer = make_tokenizer("chatml")
    refused = "{% if messages[0].content == 'no' %}{{ raise_exception('no') }}{% endif %}"
    tokenizer.chat_template = f"{refused}{tokenizer.chat_template}"
    path = tmp_path / "rows.csv"
    lines = [f"q{i},a{i}" for i in range(60)]
    lines[5:35:5] = ["no,b", "only one", "x,", '"a"b,c', "no,d", "y,"]
    path.write_text("prompt,completion\n" + "\n".join(lines) + "\n", encoding="utf-8")
    bad = [f"{path}:{i}" for i in range(7, 37, 5)]
    data = Data.model_validate(
        {
            "train": {"path": str(path), "format": {"type": "prompt_completion"}},
            "evaluation_share": 0.4,
            "seed": seed,
        }
    )

    def places(text: str) -> list[str]:
        return sorted(line.strip().partition(": ")[0] for line in text.splitlines()[1:]
                      if line.startswith(f"  {path}:"))  # fmt: skip

    def prepared(name: str, sources: list[Source], settings: Data) -> PreparedData:
        folder = tmp_path / name
        folder.mkdir()
        return prepare(sources, tokenizer, settings, folder)

    for name, sources in (("1", data.train_sources), ("2", data.evaluation_sources)):
        with pytest.raises(DataError) as caught:
            prepared(name, sources, data)
        assert str(caught.value).startswith(f"{path}: 6 bad rows")
        assert places(str(caught.value)) == sorted(bad)
    skipping = data.model_copy(update={"on_bad_row": "skip", "max_lost": 1})
    sides = [
        prepared(name, sources, skipping)
        for name, sources in (("3", data.train_sources), ("4", data.evaluation_sources))
    ]
    assert sum(side.num_bad for side in sides) == 6
    assert sum(side.num_rows for side in sides) == 54
    said = [text for text in caplog.messages if "bad row" in text]
    assert sorted(place for text in said for place in places(text)) == sorted(bad)
    assert [text.partition(":")[0] for text in said] == [
        f"{path} (training rows)", f"{path} (held-out rows)",
    ]  # fmt: skip


def test_several_sources_make_one_dataset(
    tokenizer: PreTrainedTokenizerFast, write: Callable[..., Path], tmp_path: Path
) -> None:
    paths = [write(("a", "b"), ("c", "d")), write(("e", "f"), name="more.jsonl")]
    one, other = (chat_data(path) for path in paths)
    both = Data(train=[one.train, other.train])
    prepared = make(both, tokenizer, tmp_path / "both")
    assert [prepared.examples.source(i) for i in range(3)] == [0, 0, 1]
    assert prepared.paths == list(map(str, paths))
    alone = [make(data, tokenizer, tmp_path / name) for data, name in ((one, "1"), (other, "2"))]
    assert list(prepared.examples) == [*alone[0].examples, *alone[1].examples]
    assert prepared.num_tokens == sum(one.num_tokens for one in alone)


@pytest.mark.slow
def test_any_number_of_workers_writes_the_same(
    make_tokenizer: TokenizerMaker, write: Callable[..., Path], tmp_path: Path
) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0].content == 'odd' %}{{ raise_exception('odd') }}{% endif %}"
        + tokenizer.chat_template
    )
    rows = [("a " * (1 + i % 7), "b " * (1 + i % 5)) for i in range(900)]
    rows[100::50] = [("a", "")] * 16
    rows[1] = rows[702] = ("odd", "b")
    path = write(*rows)
    folders = []
    for workers in (1, 2):
        folders.append(tmp_path / str(workers))
        data = chat_data(path, workers=workers, on_bad_row="skip")
        make(data, tokenizer, folders[-1])
    assert content(folders[0]) == content(folders[1])
    with pytest.raises(DataError, match="18 bad rows") as first:
        make(chat_data(path, workers=1), tokenizer, tmp_path / "first")
    with pytest.raises(DataError) as second:
        make(chat_data(path, workers=2), tokenizer, tmp_path / "second")
    assert str(first.value) == str(second.value)


@pytest.mark.parametrize("number", [1, 2])
def test_rows_are_read_when_they_are_needed(
    tokenizer: PreTrainedTokenizerFast, number: int
) -> None:
    read: list[int] = []

    def endless() -> Iterator[Conversation]:
        for i in itertools.count():
            read.append(i)
            yield Conversation([QUESTION, ANSWER], place=str(i))

    with Workers(tokenizer, max_length=512, truncate="cut_end", number=number) as workers:
        [row, encoded] = next(workers.encode(endless()))
    assert row.place == "0"
    assert isinstance(encoded, EncodedRow)
    assert len(read) <= 2000


@dataclass(frozen=True, slots=True)
class Deadly(Conversation):
    """Ends the process that it is sent to."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _die, (os.getpid(),)


def _die(parent: int) -> None:
    if os.getpid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_dead_worker_is_an_error_at_once(tokenizer: PreTrainedTokenizerFast) -> None:
    def rows() -> Iterator[Conversation]:
        for i in range(3000):
            kind = Deadly if i == 700 else Conversation
            yield kind([QUESTION, ANSWER], place=f"rows.jsonl:{i + 1}")

    started = time.monotonic()
    with (
        pytest.raises(DataError, match=r"data.workers: a process .* died at rows.jsonl:\d+"),
        Workers(tokenizer, max_length=64, truncate="cut_end", number=2) as workers,
    ):
        list(workers.encode(rows()))
    # Most of the time goes into importing transformers in two processes.
    assert time.monotonic() - started < 60


PREPARING = """
import multiprocessing, sys, time
from pathlib import Path
from qlora_cli.data.prepared.workers import Workers
from qlora_cli.models.tokenizer import load_tokenizer
from qlora_cli.types import Conversation, Message

def rows():
    turns = [Message("user", "a", train=False), Message("assistant", "b", train=True)]
    for number in range(3000):
        yield Conversation(turns, place=str(number))
    print(*(process.pid for process in multiprocessing.active_children()), flush=True)
    time.sleep(600)

if __name__ == "__main__":
    tokenizer = load_tokenizer(Path(sys.argv[1]))
    with Workers(tokenizer, max_length=64, truncate="cut_end", number=2) as workers:
        list(workers.encode(rows()))
"""


@pytest.mark.slow
def test_workers_end_with_a_process_that_is_killed(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    program = tmp_path / "preparing.py"
    program.write_text(PREPARING, encoding="utf-8")
    command = [sys.executable, str(program), str(tmp_path / "tokenizer")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        workers = [int(word) for word in process.stdout.readline().split()]
        process.kill()
    assert len(workers) == 2
    give_up = time.monotonic() + 30
    while alive := [pid for pid in workers if is_alive(pid)]:
        if time.monotonic() > give_up:
            for pid in alive:
                os.kill(pid, signal.SIGKILL)
            pytest.fail("workers wait for a process that is no more")
        time.sleep(0.1)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_preparation_is_quick_and_its_cost_grows_with_the_turns_alone(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    def seconds(rows: int, turns: int) -> float:
        row = Conversation([QUESTION, ANSWER] * turns)
        with Workers(tokenizer, max_length=10**6, truncate="drop", number=1) as workers:
            started = time.process_time()
            assert len(list(workers.encode([row] * rows))) == rows
            return time.process_time() - started

    seconds(1, 1)
    # Processor time, so that other work on the machine has no part in it; the floor is a tenth of
    # what one core did when this was written.
    short = seconds(1000, 1)
    assert short < 1.6
    # As many turns in fewer rows. The first row of a shape is looked at more closely.
    assert seconds(20, 50) < 2 * short + 0.2


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "prepared"


def is_found(data: Data, tokenizer: PreTrainedTokenizerFast) -> bool:
    return load_or_prepare(data.train_sources, tokenizer, data)[1]


@pytest.mark.usefixtures("kept")
def test_prepared_data_is_reused(
    make_tokenizer: TokenizerMaker, write: Callable[..., Path]
) -> None:
    path = write(("a", "b"), ("c", "d"))
    tokenizer, data = make_tokenizer(), chat_data(path)
    new, is_old = load_or_prepare(data.train_sources, tokenizer, data)
    assert not is_old
    old, is_old = load_or_prepare(data.train_sources, make_tokenizer(), data)
    assert is_old
    assert (old.record(), list(old.examples)) == (new.record(), list(new.examples))
    assert is_found(chat_data(path, packing=True, workers=1), tokenizer)
    weighted = data.model_dump() | {"train": data.train.model_dump() | {"weight": 2.0}}
    assert is_found(Data.model_validate(weighted), tokenizer)


@pytest.mark.usefixtures("kept")
def test_changed_inputs_are_prepared_again(
    make_tokenizer: TokenizerMaker, write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(("a", "b"), ("c", "d"))
    tokenizer, data = make_tokenizer(), chat_data(path)
    assert not is_found(data, tokenizer)
    for settings in (
        {"max_length": 512},
        {"truncate": "cut_prompt"},
        {"max_lost": 0.1},
        {"on_bad_row": "skip"},
    ):
        assert not is_found(chat_data(path, **settings), tokenizer)
    assert not is_found(chat_data(path), make_tokenizer("phi3"))
    other = make_tokenizer()
    other.add_tokens(["Paris"])
    assert not is_found(data, other)
    half = chat_data(path, evaluation_share=0.5)
    held_out = cache.key_of(half.evaluation_sources, tokenizer, half, "")
    assert held_out != cache.key_of(half.train_sources, tokenizer, half, "")
    with monkeypatch.context() as patch:
        patch.setattr(cache, "_LIBRARIES", ("transformers", "pytest"))
        assert not is_found(data, tokenizer)
    changed = path.read_bytes().replace(b'"d"', b'"e"')
    path.write_bytes(changed)
    assert not is_found(data, tokenizer)
    assert is_found(data, tokenizer)


def test_damaged_data_is_prepared_again(
    tokenizer: PreTrainedTokenizerFast,
    write: Callable[..., Path],
    kept: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    data = chat_data(write(("a", "b"), ("c d", "e")))
    whole, _ = load_or_prepare(data.train_sources, tokenizer, data)
    folder = whole.examples.folder
    before = content(folder)
    assert len(before) == 10
    for name, written in before.items():
        for damage, change in DAMAGE.items():
            damaged = change(written)
            if damaged == written:  # the sources of a single source are all zero
                continue
            (folder / name).write_bytes(damaged)
            caplog.clear()
            assert not is_found(data, tokenizer), f"{name} {damage}"
            [line] = [message for message in caplog.messages if "damaged" in message]
            assert line == f"{folder}: damaged ({name}); its rows are prepared anew"
            assert content(folder) == before
            assert is_found(data, tokenizer)
        (folder / name).unlink()
        assert not is_found(data, tokenizer), f"{name} removed"
    assert [path.suffix for path in sorted(kept.iterdir())] == ["", ".lock"]


def test_leftovers_of_a_killed_preparation_are_removed(
    tokenizer: PreTrainedTokenizerFast, write: Callable[..., Path], kept: Path
) -> None:
    data = chat_data(write(("a", "b")))
    assert not is_found(data, tokenizer)
    [folder] = (entry.folder for entry in cache.list_datasets())
    folder.rename(kept / f".{folder.name}.unfinished")
    assert not is_found(data, tokenizer)
    assert sorted(kept.iterdir()) == [folder, folder.with_suffix(".lock")]


def test_a_failure_leaves_nothing_behind(
    tokenizer: PreTrainedTokenizerFast, write: Callable[..., Path], kept: Path
) -> None:
    data = chat_data(write(("a", "")))
    with pytest.raises(DataError, match="bad row"):
        is_found(data, tokenizer)
    assert [path.suffix for path in kept.iterdir()] == [".lock"]


class Rewritten(Portion):
    """A file that another program writes to when its first row has been read."""

    def read(self, bad: BadRows) -> Iterator[LocatedRow]:
        for located in super().read(bad):
            path = Path(self.path)
            path.write_bytes(path.read_bytes().replace(b"Paris", b"Texas"))
            yield located


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_file_that_changes_while_it_is_read_is_not_kept(
    tokenizer: PreTrainedTokenizerFast, write: Callable[..., Path], kept: Path, use_cache: bool
) -> None:
    other, path = write(("e", "f"), name="other.jsonl"), write(("a", "b"), ("c", "Paris"))
    data = chat_data(path)
    [source], [before] = data.train_sources, chat_data(other).train_sources
    sources = [before, Rewritten(**dict(source))]
    with pytest.raises(DataError, match=r"rows.jsonl: changed while its rows were read") as caught:
        load_or_prepare(sources, tokenizer, data, use_cache=use_cache)
    assert caught.value.hint
    assert cache.list_datasets() == []
    # What is there now is another set, and nothing changes it.
    prepared, is_old = load_or_prepare(sources, tokenizer, data, use_cache=use_cache)
    assert (prepared.num_rows, is_old) == (3, False)


def test_without_a_cache_nothing_is_kept(
    tokenizer: PreTrainedTokenizerFast, write: Callable[..., Path], kept: Path
) -> None:
    data = chat_data(write(("a", "b")))
    prepared, is_old = load_or_prepare(data.train_sources, tokenizer, data, use_cache=False)
    folder = prepared.examples.folder
    assert (is_old, folder.is_dir(), kept.exists()) == (False, True, False)
    del prepared
    assert not folder.exists()


def test_a_cache_that_cannot_be_written_is_an_error(
    tokenizer: PreTrainedTokenizerFast, write: Callable[..., Path], kept: Path
) -> None:
    kept.parent.write_text("a file", encoding="utf-8")
    with pytest.raises(DataError, match="prepared data cannot be stored here") as caught:
        is_found(chat_data(write(("a", "b"))), tokenizer)
    assert "--no-cache" in str(caught.value.hint)


def test_the_cache_can_be_listed_and_cleared(
    tokenizer: PreTrainedTokenizerFast, write: Callable[..., Path], kept: Path
) -> None:
    path = write(("a", "b"), ("c", "d"))
    is_found(chat_data(path), tokenizer)
    [entry] = cache.list_datasets()
    assert (entry.paths, entry.num_rows) == ([str(path)], 2)
    assert entry.size == sum(file.stat().st_size for file in entry.folder.iterdir()) > 0
    # A set of another version is no more than a name.
    (kept / "old").mkdir()
    assert [one.num_rows for one in cache.list_datasets()] == [0, 2]
    (kept / "old").rmdir()
    assert cache.list_datasets(clear=True) == [entry]
    assert not kept.exists()
    assert cache.list_datasets() == []
