from __future__ import annotations

import hashlib
import json
import socket
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest

from qlora_cli.data.formats import Text
from qlora_cli.data.sources import BadRows, LocatedRow, Source
from qlora_cli.errors import DataError
from qlora_cli.types import Row

ROWS: list[Row] = [{"text": "one"}, {"text": 'two, with "marks"'}, {"text": "drei äöü \u2028 €"}]


def source(path: Path | str, **settings: Any) -> Source:
    return Source(path=str(path), format=Text(), **settings)


def read(path: Path | str, **settings: Any) -> tuple[list[LocatedRow], str]:
    """Return the rows and the messages about bad ones."""
    bad = BadRows()
    rows = list(source(path, **settings).read(bad))
    try:
        bad.check("source")
    except DataError as error:
        return rows, str(error)
    return rows, ""


def write(folder: Path, kind: str) -> Path:
    path = folder / f"rows.{kind}"
    texts = [row["text"] for row in ROWS]
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
        return path
    quoted = ["text", *(f'"{text.replace(chr(34), chr(34) * 2)}"' for text in texts)]
    content = {
        "jsonl": "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS),
        "json": json.dumps(ROWS, indent=2),
        "csv": "\r\n".join(quoted),
        "tsv": "\n".join(["text", *texts]) + "\n",
        "txt": "\n \n".join(texts) + "\n\n",
    }[kind]
    path.write_bytes(content.encode())
    return path


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a local path opened a socket")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "parquet", "txt"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path, kind)
    rows, errors = read(path)
    assert [located.row for located in rows] == ROWS
    assert errors == ""
    assert [located.row for located in read(path, limit=2)[0]] == ROWS[:2]
    content = path.read_bytes()
    expected = hashlib.sha256(f". {len(content)}\n".encode() + content).hexdigest()
    assert source(path).digest() == expected


@pytest.mark.parametrize(
    ("kind", "place"),
    [
        ("jsonl", ":5"),
        ("csv", ":4"),
        ("tsv", ":4"),
        ("txt", ":5"),
        ("json", ":8"),
        ("parquet", ", row 3"),
    ],
)
def test_rows_know_their_place(tmp_path: Path, kind: str, place: str) -> None:
    path = write(tmp_path, kind)
    assert read(path)[0][2].place == f"{path}{place}"


def test_a_folder_is_read_by_name_and_leaves_out_other_files(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text('{"text": "2"}\n', encoding="utf-8")
    (tmp_path / "a.txt").write_text("1\n", encoding="utf-8")
    (tmp_path / "README.md").write_text("about", encoding="utf-8")
    rows, _ = read(tmp_path)
    assert [located.row["text"] for located in rows] == ["1", "2"]
    content = b'a.txt 2\n1\nb.jsonl 14\n{"text": "2"}\n'
    assert source(tmp_path).digest() == hashlib.sha256(content).hexdigest()


def test_a_byte_order_mark_is_not_text(tmp_path: Path) -> None:
    for name, content in [("a.txt", "one"), ("b.csv", "text\none"), ("c.jsonl", '{"text": "one"}')]:
        path = tmp_path / name
        path.write_bytes(b"\xef\xbb\xbf" + content.encode())
        assert read(path)[0][0].row == {"text": "one"}


def test_json_with_one_list_inside(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"version": 1, "data": ROWS}), encoding="utf-8")
    assert [located.row for located in read(path)[0]] == ROWS


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "a"', "not JSON: Expecting ',' delimiter (column 13)"),
        (b"[1]", "expected an object, found list"),
        (b'{"text": "caf\xe9"}', "not UTF-8: byte 0xe9 (invalid continuation byte)"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' + b"[" * 120 + b"]" * 120 + b"}", "nested too deeply"),
        (
            b'{"text": ' + b"9" * 5000 + b"}",
            "the field 'text' has a number of 5,000 digits",
        ),
    ],
)
def test_a_bad_line_is_named_and_the_others_survive(
    tmp_path: Path, line: bytes, reason: str
) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line + b'\n{"text": "too"}\n')
    rows, errors = read(path)
    assert [located.row["text"] for located in rows] == ["good", "too"]
    assert errors.startswith(f"source: 1 bad row\n  {path}:2: {reason}")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.json", b'[{"text": 1},\n {"text"}]', ":2: not JSON: Expecting ':' delimiter"),
        ("a.json", b'{"text": 1}\n{"text": 2}', ":2: not JSON: Extra data"),
        ("a.json", b"7", ": expected an object, found int"),
        ("a.json", b'{"a": [], "b": []}', ": expected a list of objects, or an object with one"),
        ("a.json", b'[{"text": "a"},\n{"text": "\xff"}]', ":2: not UTF-8: byte 0xff"),
        ("a.csv", b"text,text\n1,2\n", ":1: the header names a column twice: text, text"),
        ("a.csv", b"t\xffxt\nabc\n", ":1: not UTF-8: byte 0xff"),
        ("a.parquet", b"PAR1 not at all", ": not a readable Parquet file"),
        ("a.yaml", b"text: a", ": no data file; found a.yaml, expected .jsonl, .ndjson, .json"),
    ],
)
def test_an_unparsable_file_is_an_error(
    tmp_path: Path, name: str, content: bytes, reason: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}{reason}")


def test_bad_lines_of_a_table_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('text,id\nok,1\n"a"b,2\nshort\n"two\nlines",4\nlast,5\n', encoding="utf-8")
    rows, errors = read(path)
    assert [located.row["text"] for located in rows] == ["ok", "two\nlines", "last"]
    assert f"{path}:3: not CSV" in errors
    assert f"{path}:4: 1 fields, but the header has 2" in errors


def test_lines_swallowed_by_a_quotation_mark_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('text\none\n"two\nthree\n"four" five\nsix\n"seven\n', encoding="utf-8")
    rows, errors = read(path)
    assert [located.row["text"] for located in rows] == ["one", "six"]
    mark = "a quotation mark opens a field in line"
    assert f"{mark} 3 and swallows the next 2 lines, up to line 5" in errors
    assert f"{path}:7: not CSV: unexpected end of data\n" in f"{errors}\n"


MANY = "".join(f"q{i},a{i}\n" for i in range(90))


@pytest.mark.parametrize(
    ("text", "opening", "last"),
    [
        (f'5,"oops\n{MANY}', 3, 93),
        (f'5,"oops\n{MANY}'.rstrip("\n"), 3, 93),
        (f'5,"oops\n{MANY}'.replace("\n", "\r\n"), 3, 93),
        (f'5,"oops\n{MANY}"a","b"\nz,w\n', 3, 94),
        (f'"two\nlines","oops\n{MANY}', 4, 94),
        (f'x,"oops\n{MANY}q",a,b\nz,w\n', 3, 94),
        ('"so ""it""\nis ""\nsaid" x,b\n', 3, 5),
        ('5" long,a\n"a"b,c\n', None, None),
        ('"a,b"",c"d\n', None, None),
    ],
)
def test_the_quotation_mark_that_swallows_lines_is_named(
    tmp_path: Path, text: str, opening: int | None, last: int | None
) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(f"text,label\nx,y\n{text}".encode())
    bad = BadRows()
    [first, *_] = source(path).read(bad)
    assert first.row["text"] == "x"
    [line] = bad.first
    if opening is None or last is None:
        assert "swallow" not in bad.report("a.csv")
        return
    counted = f"; {last - opening} further lines swallowed by quotation marks"
    assert bad.report("a.csv", ", left out").startswith(f"a.csv: 1 bad row, left out{counted}\n")
    merged = BadRows()
    merged.extend(bad)
    assert merged.num_swallowed == last - opening
    assert line.endswith(
        f"; a quotation mark opens a field in line {opening} and swallows the next "
        f"{last - opening} lines, up to line {last}"
    )
    assert bad.remedy("leave {them} out").startswith("close each quoted field, and write")


@pytest.mark.parametrize(
    ("name", "line", "reason", "is_hint"),
    [
        (
            "a.csv",
            "well, then",
            "2 fields, but the header has 1; fields are delimited by ','",
            True,
        ),
        ("a.csv", "a,b,c", "3 fields, but the header has 1; fields are delimited by ','", True),
        ("a.tsv", "a\tb", "2 fields, but the header has 1; fields are delimited by '\\t'", False),
    ],
)
def test_a_delimiter_inside_a_field_is_named_with_the_way_out(
    tmp_path: Path, name: str, line: str, reason: str, is_hint: bool
) -> None:
    path = tmp_path / name
    path.write_text(f"text\none\n{line}\n", encoding="utf-8")
    bad = BadRows()
    assert len(list(source(path).read(bad))) == 1
    assert reason in bad.first[0]
    hint = bad.remedy("leave {them} out")
    quoted = 'in quotation marks ("a, b"), or name another delimiter in data.train.delimiter'
    assert (quoted in hint) is is_hint


def test_a_quotation_mark_in_a_tsv_is_text(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text('text\tlabel\n"so it begins\t0\nnext\t1\n', encoding="utf-8")
    assert [located.row["text"] for located in read(path)[0]] == ['"so it begins', "next"]


def test_a_long_field_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text\n" + "a" * 300_000 + "\n", encoding="utf-8")
    assert len(read(path)[0][0].row["text"]) == 300_000


def test_all_bad_rows_are_counted_and_ten_are_shown(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    lines = ['{"text": "good"}', *['{"text": 7}'] * 12, "{", '{"txt": "a"}']
    path.write_text("\n".join(lines), encoding="utf-8")
    bad = BadRows()
    kept = list(source(path).conversations(bad))
    assert [row.place for row in kept] == [f"{path}:1"]
    with pytest.raises(DataError) as caught:
        bad.check(str(path), is_listed=True)
    message = str(caught.value).splitlines()
    assert message == [
        f"{path}: 14 bad rows",
        "  12 x field text: got .. (int), expected text",
        "  1 x not JSON: Expecting property name enclosed in double quotes (column ..)",
        "  1 x field text: missing",
        "such as",
        *(f"  {path}:{i}: field 'text': got 7 (int), expected text" for i in (2, 3, 4)),
        f"  {path}:14: not JSON: Expecting property name enclosed in double quotes (column 2)",
        f"  {path}:15: field 'text': missing; found 'txt'; did you mean 'txt'?",
        "  ... and 9 more",
    ]
    assert str(caught.value.hint).startswith("data.train.format: {type: template")
    assert "(12 of 14 rows)" in str(caught.value.hint)
    assert "qlora preview RECIPE --bad-rows bad.jsonl writes all" in str(caught.value.hint)


def test_conversations_keep_their_place(tmp_path: Path) -> None:
    path = write(tmp_path, "jsonl")
    [_, second, _] = list(source(path).conversations(BadRows()))
    assert second.messages[0].content == ROWS[1]["text"]
    assert second.place == f"{path}:3"


def test_a_file_without_rows_is_an_error(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.csv", "a.txt"):
        (tmp_path / name).write_text("\n", encoding="utf-8")
        with pytest.raises(DataError, match=r": no rows"):
            list(source(tmp_path / name).conversations(BadRows()))
    (tmp_path / "a.json").write_text("[]", encoding="utf-8")
    with pytest.raises(DataError, match=r": no rows"):
        list(source(tmp_path / "a.json").conversations(BadRows()))


def test_an_empty_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no data file; found nothing, expected "):
        read(tmp_path)


@pytest.mark.parametrize(
    "name", ["missing.jsonl", "data/x.jsonl", "data/missing", "./x", "a/b/c", "x.jsonl.gz", "/x"]
)
def test_a_missing_path_is_named_and_the_hub_is_not_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    with pytest.raises(DataError) as caught:
        list(source(name).conversations(BadRows()))
    assert str(caught.value) == f"{name}: no such file or folder"
    with pytest.raises(DataError, match="no such file"):
        source(name).digest()


@pytest.mark.parametrize(
    "settings", [{"name": "main"}, {"split": "test"}, {"revision": "main"}, {"streaming": True}]
)
def test_hub_settings_of_a_local_path_are_refused(tmp_path: Path, settings: dict[str, Any]) -> None:
    path = write(tmp_path, "jsonl")
    with pytest.raises(DataError, match="is for Hub datasets, and this path is local"):
        read(path, **settings)


def test_an_unreachable_hub_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    # What HF_HUB_OFFLINE=1 sets when these are imported.
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="owner/name: no such file or folder, and the Hub dataset"):
        list(source("owner/name").conversations(BadRows()))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[Any, ...]]:
    """Record the requests to the Hub, and answer them with a real data set on the disk."""
    file = tmp_path / "on_the_hub.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    load = datasets.load_dataset
    asked = []

    def load_dataset(path: str, name: str | None, **settings: Any) -> Any:
        asked.append((path, name, *settings.values()))
        return load(
            "json",
            data_files={settings["split"]: str(file)},
            split=settings["split"],
            streaming=settings["streaming"],
            cache_dir=str(tmp_path / "cache"),
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def test_a_hub_dataset_is_requested_with_every_setting(hub: list[tuple[Any, ...]]) -> None:
    rows, _ = read("owner/name", name="main", split="test", revision="abc", limit=1)
    assert rows == [LocatedRow(ROWS[0], "owner/name (test), row 1")]
    assert hub == [("owner/name", "main", "test", "abc", False)]


def test_a_hub_data_set_gives_the_same_rows_when_streamed(hub: list[tuple[Any, ...]]) -> None:
    assert read("owner/name", streaming=True)[0] == read("owner/name")[0]
    assert [located.row for located in read("owner/name", streaming=True)[0]] == ROWS
    assert [streaming for *_, streaming in hub] == [True, False, True]
    digests = {source("owner/name", streaming=streaming).digest() for streaming in (True, False)}
    assert len(digests) == 1


def test_columns_of_a_hub_data_set_are_refused() -> None:
    with pytest.raises(DataError, match="columns is for csv and tsv files"):
        read("owner/name", columns=["text"])


@pytest.mark.parametrize(
    "content",
    [
        b'[{"text": "a"}, {"text": "b"}]',
        b'[\n  {"text": "a"},\n  {"text": "b"}\n]\n',
        b'\n[{"text": "a"},\n{"text": "b"}]',
        b'[\n  {\n    "text": "a"\n  }\n]\n',
    ],
)
def test_a_list_in_a_jsonl_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a.jsonl: one JSON list, where each line") as caught:
        read(path)
    assert str(caught.value.hint).startswith("rename it to .json")


@pytest.mark.parametrize(
    "content",
    [
        b'{\n  "text": "a"\n}\n',
        b'{\n  "text": "a"\n}\n{\n  "text": "b"\n}',
        b'{\n  "messages": [\n    {"role": "user"},\n    {"role": "assistant"}\n  ]\n}',
        b'\n{\r\n\t"text": "a"\r\n}\r\n',
        b'{\n"text":\n"a"\n}',
    ],
)
def test_indented_objects_in_a_jsonl_file_are_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a.jsonl: objects over several lines") as caught:
        read(path)
    assert str(caught.value.hint).startswith("jq -c . FILE")


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "txt"])
def test_another_encoding_is_named(tmp_path: Path, encoding: str, kind: str) -> None:
    path = write(tmp_path, kind)
    path.write_bytes(f"\ufeff{path.read_text(encoding='utf-8')}".encode(encoding))
    with pytest.raises(DataError) as caught:
        read(path)
    name = encoding[:6].upper()
    assert str(caught.value).startswith(f"{path}: {name}, by the byte order mark")
    assert caught.value.hint == f"iconv -f {name} -t UTF-8 FILE > NEW_FILE"


@pytest.mark.parametrize(
    ("kind", "written"), [("csv", ";"), ("csv", "|"), ("csv", "\t"), ("tsv", ",")]
)
def test_another_delimiter_is_named_and_can_be_given(
    tmp_path: Path, kind: str, written: str
) -> None:
    path = tmp_path / f"a.{kind}"
    path.write_text(f"text{written}id\nok{written}1\n", encoding="utf-8")
    with pytest.raises(DataError, match="1: the header is one column: 'text") as caught:
        read(path)
    assert f"delimiter: {json.dumps(written)} if that separates" in str(caught.value.hint)
    assert read(path, delimiter=written)[0][0].row == {"text": "ok", "id": "1"}
    own = {"csv": ",", "tsv": "\t"}[kind]
    assert read(path, delimiter=own)[0][0].row == {f"text{written}id": f"ok{written}1"}


@pytest.mark.parametrize("delimiter", ["", ";;", '"', "\n"])
def test_a_delimiter_is_one_character(delimiter: str) -> None:
    with pytest.raises(ValueError, match="has to be one character"):
        source("a.csv", delimiter=delimiter)


def test_a_delimiter_is_for_tables(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a delimiter is for \.csv, \.tsv files"):
        read(write(tmp_path, "jsonl"), delimiter=";")


@pytest.mark.parametrize(
    ("name", "content", "is_table"),
    [("a.tsv", "a fine film\t1\ndull\t0\n", True), ("a.jsonl", '{"label": 1}\n', False)],
)
def test_a_field_missing_in_every_row_hints_at_a_missing_header(
    tmp_path: Path, name: str, content: str, is_table: bool
) -> None:
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match="field 'text': missing; found") as caught:
        list(source(path).conversations(BadRows()))
    assert ("data.train.columns" in str(caught.value.hint)) is is_table
    assert "on_bad_row" not in str(caught.value.hint)


def test_a_file_that_a_pattern_finds_in_several_ways_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    for name in ("1.txt", "a/2.txt", "a/b/3.txt"):
        (tmp_path / name).write_text(f"{name}\n", encoding="utf-8")
    rows = source(f"{tmp_path}/**/**/*.txt").read(BadRows())
    assert [row.row["text"] for row in rows] == ["1.txt", "a/2.txt", "a/b/3.txt"]


def test_a_pattern_without_matches_names_the_files_there(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for i in range(6):
        (tmp_path / f"{i}.csv").touch()
    with pytest.raises(DataError) as caught:
        read(f"{tmp_path}/**/*.jsonl")
    assert str(caught.value) == (
        f"{tmp_path}/**/*.jsonl: nothing matches; the folder {tmp_path} contains 0.csv, 1.csv, "
        "2.csv, 3.csv, 4.csv and 2 more"
    )
    with pytest.raises(DataError, match=f"nothing matches; there is no folder {tmp_path}/missing"):
        read(f"{tmp_path}/missing/*.jsonl")


def test_nul_in_text_is_refused(tmp_path: Path) -> None:
    for name, content in [("a.txt", b"a\0b\n"), ("b.csv", b"text\na\0b\n")]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=r"field 'text': character 2 is NUL"):
            list(source(tmp_path / name).conversations(BadRows()))
