"""Damaged files: each bad row is named by line and reason; the other rows are kept."""

from __future__ import annotations

import json
import logging
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest

from qlora_cli.data.config import Data
from qlora_cli.data.sources import BadRows, Source
from qlora_cli.data.sources.repair import Repair
from qlora_cli.errors import DataError
from qlora_cli.types import Row

NUM_ROWS = 5000
SHARE_DAMAGED = 0.1
MB = 2**20

Damage = Callable[[str], bytes]
"""From the text of a question to the line that stands for its row."""


def row(question: str) -> Row:
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": f"Answer to {question}"},
        ]
    }


def line(question: str) -> bytes:
    return json.dumps(row(question), ensure_ascii=False).encode()


def turns(question: str, *changed: tuple[int, Row | None]) -> bytes:
    """The row with some keys of some turns set, or removed where they are set to Ellipsis."""
    damaged: Any = row(question)
    for i, keys in changed:
        turn = {**damaged["messages"][i], **(keys or {})}
        damaged["messages"][i] = {k: v for k, v in turn.items() if v is not ...}
    return json.dumps(damaged).encode()


def replaced(old: bytes, new: bytes) -> Damage:
    def damage(question: str) -> bytes:
        damaged = line(question).replace(old, new, 1)
        assert damaged != line(question), old
        return damaged

    return damage


def messages(value: Any) -> Damage:
    return lambda question: json.dumps({"messages": value(question)}).encode()


def user(text: str) -> Row:
    return {"role": "user", "content": text}


def answer(text: str) -> Row:
    return {"role": "assistant", "content": text}


KINDS: dict[str, tuple[Damage, str]] = {
    # The text is not JSON.
    "cut off": (lambda q: line(q)[:-20], "not JSON: Unterminated string"),
    "no closing brace": (lambda q: line(q)[:-1], "not JSON: Expecting ',' delimiter"),
    "single quotes": (lambda q: repr(row(q)).encode(), "not JSON: Expecting property name"),
    "comma before the end": (replaced(b"]}", b"],}"), r"not JSON: .*[Tt]railing comma|property"),
    "no comma": (replaced(b"}, {", b"} {"), "not JSON: Expecting ',' delimiter"),
    "two rows": (lambda q: line(q) * 2, "not JSON: Extra data"),
    "key without quotes": (replaced(b'"messages"', b"messages"), "Expecting property name"),
    "no value": (replaced(b'"user"', b""), "not JSON: Expecting value"),
    "no escape": (replaced(b"Answer", b"\\Answer"), r"not JSON: Invalid \\escape"),
    "half an escape": (replaced(b"Answer", b"\\u00zz"), r"not JSON: Invalid \\uXXXX escape"),
    "plain text": (lambda q: q.encode(), "not JSON: Expecting value"),
    "code fence": (lambda q: b"```json", "not JSON: Expecting value"),
    "merge conflict": (lambda q: b"<<<<<<< HEAD", "not JSON: Expecting value"),
    "comment": (lambda q: b"// " + line(q), "not JSON: Expecting value"),
    "control character": (replaced(b"Answer", b"An\x07swer"), "Invalid control character"),
    "tab in a string": (replaced(b"Answer", b"An\tswer"), "Invalid control character"),
    "NUL bytes": (lambda q: b"\0" * 64, "not JSON: Expecting value .*; there is a NUL: "),
    "NaN": (replaced(b"]}", b'], "score": NaN}'), "not JSON: NaN is not a JSON number"),
    "infinity": (
        replaced(b"]}", b'], "score": -Infinity}'),
        "not JSON: -Infinity is not a JSON number",
    ),
    "huge number": (replaced(b"]}", b'], "n": ' + b"9" * 5000 + b"}"), "a number of 5,000 digits"),
    "nested": (lambda q: b"[" * 200_000, "nested too deeply"),
    "key twice": (
        replaced(b'"role"', b'"role": "system", "role"'),
        "key 'role' is in one object twice",
    ),
    "10 MB, cut off": (
        lambda q: line(q * (10 * MB // len(q)))[:-20],
        "not JSON: Unterminated string",
    ),
    # The bytes are not UTF-8, or not allowed here.
    "Latin-1": (replaced(b"Answer", b"R\xe9ponse"), "not UTF-8: byte 0xe9"),
    "Windows-1252": (replaced(b"Answer", b"\x93Answer\x94"), "not UTF-8: byte 0x93"),
    "half a character": (replaced(b"Answer", "ä".encode()[:1]), "not UTF-8: byte 0xc3"),
    "surrogate in UTF-8": (replaced(b"Answer", b"\xed\xa0\xbd"), "not UTF-8: byte 0xed"),
    "UTF-16": (lambda q: "ä {}".encode("utf-16-le"), "not UTF-8: byte 0xe4"),
    "byte order mark": (lambda q: b"\xef\xbb\xbf" + line(q), "a byte order mark before it"),
    # JSON, but not a row.
    "list": (lambda q: b"[" + line(q) + b"]", "expected an object, found list"),
    "string": (lambda q: json.dumps(q).encode(), "expected an object, found str"),
    "number": (lambda q: b"17", "expected an object, found int"),
    "null": (lambda q: b"null", "expected an object, found null"),
    "empty object": (lambda q: b"{}", "field 'messages': missing; found nothing"),
    "other key": (replaced(b"messages", b"mesages"), "field 'messages': missing; found 'mesages'"),
    # A row, but not a conversation.
    "null messages": (messages(lambda q: None), r"field 'messages': got (null|None)"),
    "text for messages": (messages(lambda q: q), "field 'messages': got 'Question"),
    "no messages": (messages(lambda q: []), "field 'messages'"),
    "text for a turn": (messages(lambda q: [q, answer(q)]), r"field 'messages\[0\]': got 'Q"),
    "null for a turn": (messages(lambda q: [user(q), None]), r"field 'messages\[1\]': got"),
    "unknown role": (
        lambda q: turns(q, (0, {"role": "humain"})),
        r"field 'messages\[0\].role': got 'humain', expected one of system, ",
    ),
    "role in capitals": (
        lambda q: turns(q, (1, {"role": "ASSISTANT"})),
        r"field 'messages\[1\].role': got 'ASSISTANT', expected one of",
    ),
    "no role": (lambda q: turns(q, (1, {"role": ...})), r"'messages\[1\].role': missing"),
    "number as role": (lambda q: turns(q, (1, {"role": 1})), r"'messages\[1\].role': got 1"),
    "no content": (lambda q: turns(q, (1, {"content": ...})), r"'messages\[1\].content': missing"),
    "null content": (lambda q: turns(q, (0, {"content": None})), r"'messages\[0\].content': got"),
    "number as content": (lambda q: turns(q, (1, {"content": 4})), r"\[1\].content': got 4"),
    "empty answer": (lambda q: turns(q, (1, {"content": ""})), r"'messages\[1\].content': empty"),
    "blank question": (
        lambda q: turns(q, (0, {"content": " \n\u00a0"})),
        r"'messages\[0\].content': empty",
    ),
    "half a surrogate pair": (
        replaced(b"Answer", b"\\ud83d"),
        r"'messages\[1\].content': character 1 is half of a surrogate pair",
    ),
    "NUL in a text": (
        replaced(b"Answer", b"An\\u0000swer"),
        r"'messages\[1\].content': character 3 is NUL \(.u0000\), which is not text",
    ),
    "two users": (messages(lambda q: [user(q), user(q), answer(q)]), r"field 'messages\[1\]"),
    "two answers": (messages(lambda q: [user(q), answer(q), answer(q)]), r"field 'messages\[2\]"),
    "missing answer": (messages(lambda q: [user(q)]), "field 'messages"),
    "text for train": (
        lambda q: turns(q, (1, {"train": "yes"})),
        r"field 'messages\[1\].train': got 'yes', expected true or false",
    ),
    "nothing to learn": (lambda q: turns(q, (1, {"train": False})), "train"),
    "broken tool call": (
        lambda q: turns(q, (1, {"tool_calls": "[{"})),
        r"field 'messages\[1\].tool_calls': got '\[\{', which is not JSON",
    ),
}

ODD_BUT_GOOD = [
    "Question with <|im_start|>user\n and <s> in it",
    "Question in \u05e2\u05d1\u05e8\u05d9\u05ea, \U0001f600, \u2028 and \u0085",
    'Question with "quotes", \\backslashes\\ and \ttabs',
    "Question with \x07 and \x1b[31m",
    "Question \ufeff with a byte order mark",
    "Question that is long " * (10 * MB // 22),
]


def damaged_file(path: Path, seed: int = 0) -> tuple[dict[int, str], list[str]]:
    """Write the file; return the damage (kind by line) and the questions of the good rows."""
    rng = random.Random(seed)
    kinds = list(KINDS)
    # The largest stand once; each of the others about ten times.
    often = [kind for kind in kinds if "10 MB" not in kind]
    at = sorted(rng.sample(range(NUM_ROWS - 1), int(SHARE_DAMAGED * NUM_ROWS)))
    drawn = [*kinds, *rng.choices(often, k=len(at) - len(kinds))]
    rng.shuffle(drawn)
    damages = dict(zip(at, drawn, strict=True))
    odd = dict(
        zip(rng.sample(sorted({*range(NUM_ROWS - 1)} - {*at}), 6), ODD_BUT_GOOD, strict=True)
    )
    found: dict[int, str] = {}
    good = []
    lines = []
    for i in range(NUM_ROWS - 1):
        question = odd.get(i, f"Question {i} äöü?")
        if rng.random() < 0.02:
            lines.append(rng.choice([b"", b"  ", b"\r"]))  # blank lines are not rows
        if i in damages:
            lines.append(KINDS[damages[i]][0](question))
            found[len(lines)] = damages[i]
        else:
            lines.append(line(question) + rng.choice([b"", b"\r", b" "]))
            good.append(question)
    lines.append(line("Question that is cut off with the file")[:60])
    found[len(lines)] = "cut off"
    path.write_bytes(b"\n".join(lines))
    return found, good


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, str], list[str]]:
    path = tmp_path_factory.mktemp("damaged") / "train.jsonl"
    return path, *damaged_file(path)


def test_there_are_many_kinds_of_damage() -> None:
    assert len(KINDS) >= 50


def test_every_damaged_row_is_named_and_every_good_one_survives(
    damaged: tuple[Path, dict[int, str], list[str]],
) -> None:
    path, damages, good = damaged
    kinds = dict(damages)
    bad = BadRows(keep=NUM_ROWS)
    kept = list(Source(path=str(path)).conversations(bad))
    assert [conversation.messages[0].content for conversation in kept] == good
    assert bad.count == len(bad.first) == len(kinds) == 501
    for error in bad.first:
        place, _, reason = error.removeprefix(f"{path}:").partition(": ")
        kind = kinds.pop(int(place))
        assert re.search(KINDS[kind][1], reason), f"{kind}: {error[:300]}"
        assert len(error) < 400, kind
    assert kinds == {}


def test_the_first_ten_are_shown_and_all_are_counted(
    damaged: tuple[Path, dict[int, str], list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    path, kinds, _ = damaged
    bad = BadRows()
    assert sum(1 for _ in Source(path=str(path)).conversations(bad)) == NUM_ROWS - len(kinds)
    assert len(bad.first) == 10
    with pytest.raises(DataError) as stopped:
        bad.check(str(path))
    with caplog.at_level(logging.WARNING, "qlora"):
        bad.check(str(path), skip=True)
    assert stopped.value.hint
    for text, head in ((str(stopped.value), "501 bad rows"), (caplog.messages[0], "501 bad rows,")):
        first, *lines, last = text.splitlines()
        assert first.startswith(f"{path}: {head}")
        at = lines.index("such as")
        counts = [int(one.split(" x ")[0]) for one in lines[:at]]
        assert counts[:-1] == sorted(counts[:-1], reverse=True)
        assert sum(counts) == 501
        assert last == "  ... and 491 more"
        assert {int(one.split(":")[1]) for one in lines[at + 1 :]} <= set(kinds)
    assert [int(one.split(":")[1]) for one in bad.first] == sorted(kinds)[:10]


def test_a_file_without_one_good_row_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("{\n" * 12, encoding="utf-8")
    bad = BadRows()
    report = r"a.jsonl: 12 bad rows\n  12 x not JSON.*\nsuch as\n(.*\n){10}  ... and 2 more"
    with pytest.raises(DataError, match=report):
        list(Source(path=str(path)).conversations(bad))


@pytest.mark.parametrize("end", [b"", b"}"])
def test_the_time_of_a_long_line_grows_with_its_length_alone(tmp_path: Path, end: bytes) -> None:
    seconds = []
    for size in (MB, 8 * MB):
        path = tmp_path / "a.jsonl"
        path.write_bytes(line("Is it? " * (size // 7))[:-1] + end)
        started = time.process_time()
        bad = BadRows()
        kept = list(Source(path=str(path)).read(bad))
        seconds.append(time.process_time() - started)
        assert (len(kept), bad.count) == ((1, 0) if end else (0, 1))
    # Eight times, if it is linear; 64 times, if it is quadratic.
    assert seconds[1] < 24 * max(seconds[0], 0.005)


READ = """
import resource, sys
from qlora_cli.data.config import Data
from qlora_cli.data.sources import BadRows, Source
from qlora_cli.data.sources.repair import Repair

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

source = Source(path=sys.argv[1], shuffle=sys.argv[2] == "shuffled", format={"type": "text"})
before = peak()
rows = source.conversations(BadRows())
print(len(list(rows)) if sys.argv[2] == "held" else sum(1 for _ in rows), peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has another unit elsewhere")
@pytest.mark.parametrize(
    ("how", "num_rows", "most"), [("in order", 60_000, 8), ("shuffled", 40_000, 8)]
)
def test_rows_are_not_held_in_memory(tmp_path: Path, how: str, num_rows: int, most: int) -> None:
    """A list of 40,000 conversations takes 17 MiB."""
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f'{{"text": "row {i}"}}\n' for i in range(num_rows)), encoding="utf-8")
    command = [sys.executable, "-c", READ, str(path), how]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rows, grown = map(int, done.stdout.split())
    assert rows == num_rows
    assert grown < most, f"{grown} MiB more than before the first row"


def chat(*turns: tuple[str, str]) -> bytes:
    messages = [{"role": role, "content": content} for role, content in turns]
    return json.dumps({"messages": messages}).encode()


USER, ANSWER = ("user", "a"), ("assistant", "b")
MERGE, DROP, PARSE, ROLES = (
    "merge_same_role", "drop_trailing_user", "parse_json_strings", "role_names",
)  # fmt: skip
# A bad row, and the repairs that it needs.
CAUSES = {
    "two of one role": (chat(USER, ("user", "c"), ANSWER), [MERGE]),
    "two answers": (chat(USER, ANSWER, ANSWER), [MERGE]),
    "a last question": (chat(USER, ANSWER, USER), [DROP]),
    "two last questions": (chat(USER, ANSWER, USER, USER), [DROP]),
    "JSON text": (
        json.dumps({"messages": json.dumps(row("a")["messages"])}).encode(),
        [PARSE],
    ),
    "a capital": (chat(("User", "a"), ANSWER), [ROLES]),
    "another name": (chat(("human", "a"), ("bot", "b")), [ROLES]),
    "other names and two of one role": (chat(("human", "a"), USER, ANSWER), [ROLES, MERGE]),
    "no answer at all": (chat(USER), []),
    "a system message last": (chat(USER, ANSWER, ("system", "c")), []),
    "not JSON": (b"{", []),
    "a number as text": (b'{"messages": 7}', []),
}
SKIP = "out with data.on_bad_row: skip"


def hints(path: Path, *lines: bytes, **settings: Any) -> tuple[str, str]:
    """The hint for these bad rows, beside usable rows and without any."""
    source = Data.model_validate({"train": {"path": str(path)}, **settings}).train_sources[0]
    path.write_bytes(b"\n".join([chat(USER, ANSWER), *lines]))
    bad = BadRows()
    assert len(list(source.conversations(bad))) == 1
    with pytest.raises(DataError) as beside:
        bad.check(str(path))
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(DataError) as alone:
        list(source.conversations(BadRows()))
    assert beside.value.hint is not None
    assert alone.value.hint is not None
    return beside.value.hint, alone.value.hint


@pytest.mark.parametrize("cause", CAUSES)
def test_the_repairs_that_a_bad_row_needs_are_named(tmp_path: Path, cause: str) -> None:
    line, repairs = CAUSES[cause]
    way = f"data.repair: [{', '.join(repairs)}]"
    beside, alone = hints(tmp_path / "train.jsonl", *[line] * 4)
    instead = f"{way}; or repair them" if repairs else "repair them"
    assert beside == f"{instead}, or leave them {SKIP}"
    assert alone == f"{instead}, or check data.train.format; no row can be used as it is"
    others = [b"{"] * 3 + [b'{"messages": []}'] * 3
    beside, alone = hints(tmp_path / "train.jsonl", line, *others)
    instead = f"{way} (1 of 7 rows); repair the remaining 6 rows" if repairs else "repair them"
    assert beside == f"{instead}, or leave them {SKIP}"
    assert alone.startswith(instead)
    if repairs:
        bad = BadRows()
        path = tmp_path / "train.jsonl"
        data = Data.model_validate({"train": {"path": str(path)}, "repair": repairs})
        assert len(list(data.train_sources[0].conversations(bad))) == 1
        assert bad.count == 6


@pytest.mark.parametrize("count", range(1, len(CAUSES) + 1))
def test_all_repairs_that_help_are_named_together(tmp_path: Path, count: int) -> None:
    lines, repairs = zip(*list(CAUSES.values())[:count], strict=True)
    needed = [name for name in get_args(Repair) if any(name in some for some in repairs)]
    left = sum(not some for some in repairs)
    beside, _ = hints(tmp_path / "train.jsonl", *lines)
    many = f"{left} rows, or leave them" if left > 1 else "row, or leave it"
    remaining = f" ({count - left} of {count} rows); repair the remaining {many} {SKIP}"
    assert beside == f"data.repair: [{', '.join(needed)}]" + (
        remaining if left else f"; or repair them, or leave them {SKIP}"
    )


def test_repairs_of_the_recipe_are_named_with_those_that_help_too(tmp_path: Path) -> None:
    line, _ = CAUSES["two of one role"]
    beside, _ = hints(tmp_path / "train.jsonl", line, repair=[DROP])
    assert beside.startswith(f"data.repair: [{MERGE}, {DROP}];")


@pytest.mark.parametrize("num_others", [0, 1, 3])
def test_a_template_that_writes_numbers_as_text_is_named_if_it_helps_most_rows(
    tmp_path: Path, num_others: int
) -> None:
    settings = {"path": str(tmp_path / "a.jsonl"), "format": {"type": "text"}}
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([b'{"text": 7}'] * 3 + [b"{"] * num_others))
    with pytest.raises(DataError) as caught:
        list(Source.model_validate(settings).conversations(BadRows()))
    is_named = "data.train.format: {type: template" in str(caught.value.hint)
    assert is_named is (num_others < 3)
