"""Options of a source: renamed columns, order, held-out share, and supervised turns."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import random
import re
from collections import Counter
from collections.abc import Iterable
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

import qlora_cli
from qlora_cli.data.config import Data
from qlora_cli.data.formats import Messages, TemplateFormat, Text
from qlora_cli.data.sources import BadRows, LocatedRow, Source
from qlora_cli.data.sources.rows import shuffled
from qlora_cli.errors import DataError
from qlora_cli.types import Row

ROWS: list[Row] = [{"text": f"row {i}"} for i in range(200)]


def write(path: Path, rows: Iterable[Row]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def texts(source: Source) -> list[str]:
    bad = BadRows()
    found = [str(located.row["text"]) for located in source.read(bad)]
    bad.check(source.path)
    return found


def errors(source: Source) -> list[str]:
    bad = BadRows()
    assert list(source.read(bad)) == []
    return bad.first


def test_a_pattern_takes_the_files_that_match_by_name(tmp_path: Path) -> None:
    for name in ("b/two.jsonl", "a/one.jsonl", "a/deep/three.jsonl", "a/left.md", "a/out.txt"):
        write(tmp_path / name, [{"text": name}])
    assert texts(Source(path=f"{tmp_path}/*/*.jsonl")) == ["a/one.jsonl", "b/two.jsonl"]
    every = texts(Source(path=f"{tmp_path}/**/*.jsonl"))
    assert every == ["a/deep/three.jsonl", "a/one.jsonl", "b/two.jsonl"]
    with pytest.raises(DataError, match=r"csv: nothing matches; the folder /.* contains a/, b/$"):
        texts(Source(path=f"{tmp_path}/*.csv"))


def test_a_file_whose_name_looks_like_a_pattern_is_read(tmp_path: Path) -> None:
    assert texts(Source(path=write(tmp_path / "a[1].jsonl", ROWS[:1]))) == ["row 0"]


@pytest.mark.parametrize("ending", ["gz", "bz2", "xz", "zst"])
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "txt"])
def test_compressed_files_give_the_same_rows(tmp_path: Path, kind: str, ending: str) -> None:
    content = {
        "jsonl": "\n".join(map(json.dumps, ROWS)),
        "json": json.dumps(ROWS),
        "csv": "\n".join(["text", *(row["text"] for row in ROWS)]),
        "txt": "\n".join(row["text"] for row in ROWS),
    }[kind].encode()
    path = tmp_path / f"rows.v1.{kind}.{ending}"
    if ending == "zst":
        with pyarrow.output_stream(str(path), compression="zstd") as file:
            file.write(content)
    else:
        path.write_bytes({"gz": gzip, "bz2": bz2, "xz": lzma}[ending].compress(content))
    assert texts(Source(path=str(path))) == [row["text"] for row in ROWS]
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=r"cut short|Truncated compressed stream"):
        texts(Source(path=str(path)))
    path.write_bytes(b"no such thing")
    with pytest.raises(DataError, match="cannot be read"):
        texts(Source(path=str(path)))


def test_self_compressing_tables_are_not_read_from_gzip(
    tmp_path: Path,
) -> None:
    path = tmp_path / "rows.parquet.gz"
    path.write_bytes(b"")
    with pytest.raises(DataError, match=r"all but .parquet and .arrow may be compressed"):
        texts(Source(path=str(path)))


@pytest.mark.parametrize("is_stream", [True, False])
def test_both_kinds_of_arrow_file_are_read(tmp_path: Path, is_stream: bool) -> None:
    path = tmp_path / "rows.arrow"
    table = pyarrow.Table.from_pylist(ROWS)
    new = pyarrow.ipc.new_stream if is_stream else pyarrow.ipc.new_file
    with pyarrow.OSFile(str(path), "wb") as file, new(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=64)
    assert texts(Source(path=str(path))) == [row["text"] for row in ROWS]
    path.write_bytes(b"ARROW1" * is_stream + b"\0\0\0\0 and no more")
    with pytest.raises(DataError, match="not a readable Arrow file"):
        texts(Source(path=str(path)))


@pytest.mark.parametrize("kind", ["arrow", "parquet"])
@pytest.mark.parametrize(("old", "new"), [(b"row 7", b"row \xff"), (b"text", b"t\xffxt")])
def test_invalid_text_makes_a_table_unreadable(
    tmp_path: Path, kind: str, old: bytes, new: bytes
) -> None:
    path = tmp_path / f"rows.{kind}"
    table = pyarrow.Table.from_pylist(ROWS)
    if kind == "parquet":
        pyarrow.parquet.write_table(table, path, compression="none", store_schema=False)
    else:
        with pyarrow.ipc.new_stream(str(path), table.schema) as writer:
            writer.write_table(table)
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new))
    with pytest.raises(DataError, match=r"not a readable (Arrow|Parquet) file: .*(UTF|utf-)8"):
        texts(Source(path=str(path)))


def test_a_table_without_header_is_read_by_its_columns(tmp_path: Path) -> None:
    path = tmp_path / "sst2.tsv"
    path.write_text("a fine film\t1\nshort\ndull\t0\n", encoding="utf-8")
    source = Source(path=str(path), columns=["text", "label"])
    bad = BadRows()
    assert [located.row["label"] for located in source.read(bad)] == ["1", "0"]
    assert bad.first == [f"{path}:2: 1 fields, but there are columns for 2"]
    with pytest.raises(ValueError, match="names a column twice: a, a"):
        Source(path="x.csv", columns=["a", "a"])
    with pytest.raises(DataError, match=r"columns are for .csv, .tsv files"):
        texts(Source(path=write(tmp_path / "a.jsonl", ROWS), columns=["text"]))


def test_a_badly_encoded_record_does_not_affect_the_others(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'id,text\n1,one\n2,"caf\xe9\nau lait"\n3,three\n')
    bad = BadRows()
    rows = [located.row["text"] for located in Source(path=str(path)).read(bad)]
    assert rows == ["one", "three"]
    [line] = bad.first
    assert line.startswith(f"{path}:3: not UTF-8: byte 0xe9 (invalid continuation byte); if it is ")


def test_columns_are_renamed_before_the_format_reads_them(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"body": "one", "text": "old", "id": 1}])
    [located] = Source(path=path, fields={"text": "body"}).read(BadRows())
    assert located.row == {"text": "one", "id": 1}
    [swapped] = Source(path=path, fields={"text": "body", "body": "text"}).read(BadRows())
    assert swapped.row == {"text": "one", "body": "old", "id": 1}
    assert errors(Source(path=path, fields={"text": "bdy"})) == [
        f"{path}:1: field 'bdy' (of fields): missing; found 'body', 'text', 'id'; "
        "did you mean 'body'?"
    ]


@pytest.mark.parametrize(
    ("format", "columns", "found"),
    [
        ({"type": "text", "field": "txt"}, ["text", "id"], "'text', 'id'; did you mean 'text'?"),
        ({"type": "text"}, ["TEXT"], "'TEXT'; did you mean 'TEXT'?"),
        ({"type": "text"}, [" text "], "' text '; did you mean ' text '?"),
        ({"type": "prompt_completion"}, ["promt", "a"], "'promt', 'a'; did you mean 'promt'?"),
        ({"type": "alpaca"}, ["instructions"], "'instructions'; did you mean 'instructions'?"),
        (
            {"type": "template", "user": "{{ qestion }}"},
            ["question", "completion"],
            "'question', 'completion'; did you mean 'question'?",
        ),
        ({"type": "messages"}, ["frage", "antwort"], "'frage', 'antwort'"),
        (
            {"type": "text"},
            [*(f"c{i}" for i in range(50)), "texts"],
            f"{', '.join(repr(f'c{i}') for i in range(20))} and 31 more; did you mean 'texts'?",
        ),
        ({"type": "text"}, ["x" * 100], f"'{'x' * 60}...'"),
    ],
)
def test_a_missing_column_names_the_columns_and_the_most_similar(
    tmp_path: Path, format: dict[str, str], columns: list[str], found: str
) -> None:
    path = write(tmp_path / "a.jsonl", [dict.fromkeys(columns, "a")])
    with pytest.raises(DataError) as caught:
        list(Source.model_validate({"path": path, "format": format}).conversations(BadRows()))
    assert str(caught.value).endswith(f": missing; found {found}")


def test_a_wrong_column_of_fields_has_a_hint_of_its_own(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"body": "one"}] * 3)
    with pytest.raises(DataError, match="did you mean 'body'") as caught:
        list(Source(path=path, format=Text(), fields={"text": "bdy"}).conversations(BadRows()))
    assert str(caught.value.hint).startswith("no row has that column: data.train.fields takes")


@pytest.mark.parametrize("limit", [None, 200])
def test_shuffling_only_changes_the_order(tmp_path: Path, limit: int | None) -> None:
    path = write(tmp_path / "a.jsonl", ROWS)
    drawn = texts(Source(path=path, shuffle=True, limit=limit))
    assert drawn != texts(Source(path=path))
    assert sorted(drawn) == sorted(texts(Source(path=path)))
    assert drawn == texts(Source(path=path, shuffle=True, limit=limit))
    [other] = Data(train=Source(path=path, shuffle=True, limit=limit), seed=1).train_sources
    assert texts(other) != drawn
    write(tmp_path / "a.jsonl", reversed(ROWS))
    assert texts(Source(path=path, shuffle=True, limit=limit)) == drawn


def test_shuffled_rows_keep_values_that_json_cannot_represent(tmp_path: Path) -> None:
    values: list[Any] = [
        datetime(2024, 7, 26, 12, 30, tzinfo=UTC), Decimal("1.10"), b"\xff\0", 2**70, -0.0, 1e-310,
        "\ud800 \u2028 \x85", None, True, {"\0": {"deep": b"x"}}, ["a", ["b"]],
    ]  # fmt: skip
    rows = [LocatedRow({"i": i, "value": one}, f"t\udcff:{i}") for i, one in enumerate(values)]
    found = list(shuffled(rows, seed=1, limit=None))
    assert sorted(found, key=lambda one: one.row["i"]) == rows
    assert [type(one.row["value"]) for one in found] == [
        type(values[one.row["i"]]) for one in found
    ]
    column = pyarrow.array(values[:1] * 3)
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"at": column, "i": [0, 1, 2]}), path)
    [*read] = Source(path=str(path), shuffle=True).read(BadRows())
    assert sorted(one.row["i"] for one in read) == [0, 1, 2]
    assert {one.row["at"] for one in read} == {values[0]}


def test_no_file_is_pickled() -> None:
    """The README says so."""
    files = sorted(Path(qlora_cli.__file__).parent.rglob("*.py"))
    assert len(files) > 50
    importing = re.compile(r"^\s*(import|from) (pickle|marshal|shelve|dill|cloudpickle)\b", re.M)
    assert [path.name for path in files if importing.search(path.read_text("utf-8"))] == []


def test_a_limit_takes_the_first_of_the_shuffled_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ROWS)
    drawn = texts(Source(path=path, shuffle=True))
    assert texts(Source(path=path, shuffle=True, limit=7)) == drawn[:7]


def sides(path: str, **settings: Any) -> tuple[list[str], list[str]]:
    data = Data(train=Source(path=path, format=Text()), evaluation_share=0.25, **settings)
    [training], [held_out] = data.train_sources, data.evaluation_sources
    return said(training), said(held_out)


def said(source: Source) -> list[str]:
    bad = BadRows()
    found = [row.messages[0].content for row in source.conversations(bad)]
    bad.check(source.path)
    return found


def test_a_share_is_held_out_and_no_row_is_on_both_sides(tmp_path: Path) -> None:
    training, held_out = sides(write(tmp_path / "a.jsonl", ROWS))
    assert sorted(training + held_out) == sorted(row["text"] for row in ROWS)
    assert 35 < len(held_out) < 65


def test_the_held_out_share_depends_on_content_and_seed_but_not_on_order(tmp_path: Path) -> None:
    _, held_out = sides(write(tmp_path / "a.jsonl", ROWS))
    moved = random.Random(0).sample(ROWS, len(ROWS))
    write(tmp_path / "b" / "one.jsonl", moved[:90])
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(moved[90:]), tmp_path / "b" / "two.parquet"
    )
    assert set(sides(str(tmp_path / "b"))[1]) == set(held_out)
    assert sides(str(tmp_path / "a.jsonl"), seed=1)[1] != held_out


def test_equal_rows_are_on_the_same_side(tmp_path: Path) -> None:
    training, held_out = sides(write(tmp_path / "a.jsonl", ROWS * 3))
    assert set(Counter(held_out).values()) == {3}
    assert not set(training) & set(held_out)


def test_rows_with_the_same_conversation_are_on_the_same_side(tmp_path: Path) -> None:
    twice = [{**row, "id": f"{copy}-{i}"} for copy in "ab" for i, row in enumerate(ROWS)]
    training, held_out = sides(write(tmp_path / "a.jsonl", twice))
    assert len(training) + len(held_out) == 400
    assert not set(training) & set(held_out)


def test_a_bad_row_is_counted_in_one_split_only(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [*ROWS, *({"body": i} for i in range(20))])
    with Path(path).open("a", encoding="utf-8") as file:
        file.write("\n" + "{\n" * 20)  # not even a row
    data = Data(train=Source(path=path, format=Text()), evaluation_share=0.25)
    bad = BadRows(keep=100), BadRows(keep=100)
    for one, of_side in zip((*data.train_sources, *data.evaluation_sources), bad, strict=True):
        list(one.conversations(of_side))
    assert bad[0].count > 0
    assert bad[1].count > 0
    assert len({*bad[0].first, *bad[1].first}) == bad[0].count + bad[1].count == 40


def test_the_digest_of_a_folder_covers_names_and_file_boundaries(tmp_path: Path) -> None:
    def digest(name: str, **files: str) -> str:
        folder = tmp_path / name
        folder.mkdir()
        for stem, text in files.items():
            (folder / f"{stem}.jsonl").write_text(text)
        return Source(path=str(folder)).digest()

    one = digest("one", a="1\n2\n", b="3\n")
    assert digest("copy", a="1\n2\n", b="3\n") == one
    assert digest("moved", a="1\n", b="2\n3\n") != one
    assert digest("renamed", a="1\n2\n", c="3\n") != one


def test_a_limit_counts_rows_of_both_sides(tmp_path: Path) -> None:
    data = Data(
        train=Source(
            path=write(tmp_path / "a.jsonl", ROWS), format=Text(), shuffle=True, limit=100
        ),
        evaluation_share=0.25,
    )
    training, held_out = (said(one) for one in (*data.train_sources, *data.evaluation_sources))
    assert len(training) + len(held_out) == 100
    assert 10 < len(held_out) < 40


def test_a_share_that_holds_nothing_out_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ROWS[:1])
    data = Data(train=Source(path=path, format=Text()), evaluation_share=0.01)
    with pytest.raises(DataError, match=r"a.jsonl: no rows among the share that is held out"):
        list(data.evaluation_sources[0].conversations(BadRows()))


def test_several_sources_are_given_in_order() -> None:
    a, b = Source(path="a"), Source(path="b", weight=2)
    data = Data(train=[a, b], evaluation=b)
    assert [(one.path, one.weight) for one in data.train_sources] == [("a", 1), ("b", 2)]
    assert [one.path for one in data.evaluation_sources] == ["b"]
    assert Data(train=a).evaluation_sources == []


TURNS = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "u1"},
    {"role": "assistant", "content": "a1"},
    {"role": "user", "content": "u2"},
    {"role": "assistant", "content": "a2"},
]


def trained_texts(tmp_path: Path, turns: list[Row], **settings: Any) -> list[str]:
    path = write(tmp_path / "a.jsonl", [{"messages": turns}])
    bad = BadRows()
    try:
        [conversation] = Source(path=path, format=Messages(), **settings).conversations(bad)
    except DataError:
        return bad.first
    return [message.content for message in conversation.messages if message.train]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, ["a1", "a2"]),
        ({"learn_roles": ["user"]}, ["u1", "u2"]),
        ({"learn_roles": ["assistant", "system"]}, ["s", "a1", "a2"]),
        ({"learn_turns": "last"}, ["a2"]),
        ({"learn_roles": ["user"], "learn_turns": "last"}, ["u2"]),
    ],
)
def test_learn_roles_and_learn_turns_choose_the_supervised_turns(
    tmp_path: Path, settings: dict[str, Any], expected: list[str]
) -> None:
    assert trained_texts(tmp_path, TURNS, **settings) == expected


def test_the_train_flag_of_a_message_wins(tmp_path: Path) -> None:
    without_first = [*TURNS[:2], {**TURNS[2], "train": False}, *TURNS[3:]]
    assert trained_texts(tmp_path, without_first) == ["a2"]
    assert trained_texts(tmp_path, without_first, learn_roles=["user", "assistant"]) == [
        "u1",
        "u2",
        "a2",
    ]
    quiet = [{**TURNS[0], "train": False}, {**TURNS[1], "weight": 0}, *TURNS[2:]]
    every = {"learn_roles": ["system", "user", "assistant"]}
    assert trained_texts(tmp_path, quiet, **every) == ["a1", "u2", "a2"]
    marked = [*TURNS[:2], {**TURNS[2], "weight": 1}, *TURNS[3:]]
    assert trained_texts(tmp_path, marked, learn_roles=["user"]) == ["u1", "a1", "u2"]
    assert trained_texts(tmp_path, marked, learn_turns="last") == ["a1", "a2"]
    with_user = [TURNS[0], {**TURNS[1], "train": True}, *TURNS[2:]]
    assert trained_texts(tmp_path, with_user) == ["u1", "a1", "a2"]
    without_last = [*TURNS[:4], {**TURNS[4], "train": False}]
    [error] = trained_texts(tmp_path, without_last, learn_turns="last")
    assert error.endswith("a.jsonl:1: nothing to train on in its last turn of assistant")


def test_learn_prompt_trains_on_every_role(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"messages": TURNS}])
    [whole] = Source(path=path, learn_prompt=True).conversations(BadRows())
    [plain] = Source(path=path).conversations(BadRows())
    assert (whole.train_on_all, plain.train_on_all) == (True, False)
    with pytest.raises(ValueError, match="learn_prompt"):
        Source(path=path, learn_prompt=True, learn_turns="last")


def rendered(template: TemplateFormat, row: Row) -> list[tuple[str, str, bool]]:
    messages = template.to_conversation(row).messages
    return [(message.role, message.content, message.train) for message in messages]


def test_a_template_turns_columns_into_messages() -> None:
    template = TemplateFormat(
        system="Say how it is.",
        user="Classify: {{ sentence }}\n",
        assistant="{{ ['negative', 'positive'][label | int] }}",
    )
    assert rendered(template, {"sentence": "a <fine> & 'dandy' film", "label": "1"}) == [
        ("system", "Say how it is.", False),
        ("user", "Classify: a <fine> & 'dandy' film\n", False),
        ("assistant", "positive", True),
    ]


def test_a_template_formats_lists_only_by_its_filters() -> None:
    row = {"prompt": "p", "parts": ["<a>", "ä"]}
    for expression, text in [("parts | tojson", '["<a>", "ä"]'), ("parts | join('+')", "<a>+ä")]:
        template = TemplateFormat(assistant="{{ " + expression + " }}")
        assert rendered(template, row)[-1][1] == text


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{{ lable }}", "field 'lable': missing; found 'label', 'text', 'none', 'items', 'zero'"),
        ("{{ label[7] }}", "field 'label' (in assistant): "),
        ("{{ ['no', 'yes'][label | int] }}", "field 'label' (in assistant): "),
        ("{{ label / 0 }}", "field 'label' (in assistant): "),
        ("{{ none_ }}", "field 'none_': missing"),
        ("{{ text }}{{ items }}", "field 'items', 'text' (in assistant): a list is not text"),
        ("{{ empty }}", "field 'empty': missing"),
        ("{{ text.__class__.__mro__ }}", "field 'text' (in assistant): access to attribute"),
        ("{{ items.append(1) }}", "field 'items' (in assistant): "),
        ("{{ text | trim }}", "field 'text' (in assistant): empty"),
        (" ", "the template of assistant: empty"),
        ("{{ zero }}", "field 'zero' (in assistant): NUL"),
    ],
)
def test_a_row_that_a_template_cannot_render_is_named_by_field(text: str, reason: str) -> None:
    row = {"label": 5, "text": " ", "none": None, "items": [1], "zero": "\0"}
    with pytest.raises(DataError) as caught:
        TemplateFormat(user="u", assistant=text).to_conversation(row)
    assert str(caught.value).startswith(reason)


def test_a_broken_template_is_found_when_the_recipe_is_read() -> None:
    with pytest.raises(ValueError, match="user: line 2 of the template: Expected an expression"):
        TemplateFormat(user="Classify\n{{ }}")


@pytest.mark.parametrize("value", ["{}", "[1, {}]", '{{"inner": {}}}', "-{}"])
@pytest.mark.parametrize("kind", ["jsonl", "json"])
def test_a_number_of_thousands_of_digits_names_its_field(
    tmp_path: Path, value: str, kind: str
) -> None:
    """Python refuses to read it, and would advise to change a setting of Python."""
    row = f'{{"text": "a", "wide": {value.format("9" * 5000)}}}'
    path = tmp_path / f"rows.{kind}"
    path.write_text(row if kind == "jsonl" else f"[{row}]", encoding="utf-8")
    field = "inner" if "inner" in value else "wide"
    bad = BadRows()
    try:
        assert list(Source(path=str(path)).read(bad)) == []
        said = "".join(bad.first)
    except DataError as error:  # a json file is read as a whole
        said = str(error)
    assert f"the field '{field}' has a number of 5,00" in said
    assert "put it in quotes" in said
