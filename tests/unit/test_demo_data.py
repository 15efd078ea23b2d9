"""Check the demo data: training never shows its test rows, and its answers are right."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from random import Random
from typing import Any

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
# Scripts are not a package; they import each other from the folder that they are started in.
sys.path.insert(0, str(SCRIPTS))

import make_demo_data as demo  # noqa: E402
from demo_words import TEST, TRAIN  # noqa: E402

KEYS = ["action", "room", "who", "day", "time"]
Messages = list[dict[str, str]]


def write_demo(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, SCRIPTS / "make_demo_data.py", "--output", folder, *options]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8")


@pytest.fixture(scope="module")
def demo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    assert write_demo(folder).returncode == 0
    return folder


def read(folder: Path, name: str) -> list[Messages]:
    lines = (folder / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["messages"] for line in lines]


def answer(messages: Messages) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(messages[2]["content"])
    return parsed


def test_there_are_enough_rows(demo_folder: Path) -> None:
    assert len(read(demo_folder, "test.jsonl")) >= 200
    assert len(read(demo_folder, "train.jsonl")) >= 500


def test_same_seed_same_bytes(demo_folder: Path, tmp_path: Path) -> None:
    write_demo(tmp_path / "again")
    write_demo(tmp_path / "other", "--seed", "1")
    for name in ("train.jsonl", "test.jsonl"):
        first = (demo_folder / name).read_bytes()
        assert (tmp_path / "again" / name).read_bytes() == first
        assert (tmp_path / "other" / name).read_bytes() != first


def test_existing_files_are_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text("mine\n", encoding="utf-8")
    refused = write_demo(tmp_path)
    assert refused.returncode == 1
    assert "--overwrite" in refused.stderr
    assert path.read_text(encoding="utf-8") == "mine\n"
    assert write_demo(tmp_path, "--overwrite").returncode == 0
    assert "already there" in write_demo(tmp_path).stdout


def test_rows_follow_the_schema(demo_folder: Path) -> None:
    for messages in read(demo_folder, "train.jsonl") + read(demo_folder, "test.jsonl"):
        assert [m["role"] for m in messages] == ["system", "user", "assistant"]
        request, fields = messages[1]["content"], answer(messages)
        assert list(fields) == KEYS
        assert fields["action"] in ("book", "cancel")
        assert re.fullmatch(r"[A-H]\d{3}", fields["room"])
        assert re.fullmatch(r"[a-z]+day|tomorrow", fields["day"])
        assert re.fullmatch(r"\d{1,2}:[0-5]\d", fields["time"])
        # What is copied is there to be copied; no slot of a sentence stayed open.
        assert all(fields[key].lower() in request.lower() for key in KEYS[1:])
        assert not set("{}") & set(request)


def test_no_request_occurs_twice(demo_folder: Path) -> None:
    rows = read(demo_folder, "train.jsonl") + read(demo_folder, "test.jsonl")
    requests = [demo.normalise(messages[1]["content"]) for messages in rows]
    assert len(set(requests)) == len(requests)


def test_values_of_the_test_rows_were_never_seen(demo_folder: Path) -> None:
    seen = {
        word
        for messages in read(demo_folder, "train.jsonl")
        for word in demo.normalise(messages[1]["content"]).split()
    }
    for messages in read(demo_folder, "test.jsonl"):
        fields = answer(messages)
        assert not {fields["room"].lower(), fields["who"].split()[1].lower()} & seen, messages


def test_a_third_of_the_test_sentences_was_never_seen() -> None:
    for kind in ("book", "cancel"):
        assert not set(getattr(TRAIN, kind)) & set(getattr(TEST, kind))
    examiner = demo.Writer(TEST, Random("sentences"), known=TRAIN)
    new = {*TEST.book, *TEST.cancel}
    drawn = [examiner.sentence("book") for _ in range(600)]
    assert sum(sentence in new for sentence in drawn) == pytest.approx(200, abs=40)


def test_a_value_on_both_sides_is_found() -> None:
    requests = demo.make_requests(demo.Writer(TRAIN, Random("a")), 20)
    assert demo.shared_values(requests, requests[:1])
    others = demo.make_requests(demo.Writer(TEST, Random("b")), 20)
    assert not demo.shared_values(requests, others)
