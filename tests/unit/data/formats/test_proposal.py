"""A proposed template works when it is copied, whatever the columns of the file are called."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import yaml

from qlora_cli.data.formats.proposal import propose_template
from qlora_cli.data.sources import BadRows, Source
from qlora_cli.errors import DataError

PAIRS = [
    ("Nachricht", "Kategorie"),
    ("Größe", "Straße"),
    ("Meine Frage", "Die Antwort"),
    ("a b", "a-b"),
    ("if", "true"),
    ("range", "self"),
    ("1", "2."),
    ('so "it"', "back\\slash"),
    ("tab\tname", "{{ x }}"),
    ("", "# no comment: {a, b}"),
    ("日本 語", "🙂"),
    ("column_1", "null"),
    ("text", "Text"),
    ("a b", "a_b"),
]


def copied(proposal: str) -> dict[str, object]:
    """Read a proposal as YAML, as if each key had been copied into its place."""
    keys = proposal.replace(" and data.train.format: ", "\ndata.train.format: ")
    return {k.removeprefix("data.train."): v for k, v in yaml.safe_load(keys).items()}


@pytest.mark.parametrize("columns", PAIRS, ids=repr)
def test_a_proposed_template_reads_the_columns_of_the_file(
    tmp_path: Path, columns: tuple[str, str]
) -> None:
    path = tmp_path / "a.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([columns, ("question", " label ")])
    # As a user meets it: the hint of a file that the format of the recipe does not read.
    with pytest.raises(DataError) as caught:
        list(Source(path=str(path)).conversations(BadRows()))
    assert propose_template(*columns) in str(caught.value.hint)
    proposal = propose_template(*columns, filters=" | trim")
    source = Source.model_validate({"path": str(path), **copied(proposal)})
    [row] = source.conversations(BadRows())
    assert [turn.content for turn in row.messages] == ["question", "label"]


def test_fields_that_the_source_has_are_kept(tmp_path: Path) -> None:
    fields = {"my text": "Text", "label": "Art"}
    proposal = copied(propose_template("my text", "label", fields=fields))
    assert proposal["fields"] == {"my_text": "Text", "label": "Art"}


@pytest.mark.parametrize("line", ['{"a": [1], "b": "x"}', '{"a": "x"}'])
def test_rows_that_are_not_a_table_get_no_columns(tmp_path: Path, line: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(line, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        list(Source(path=str(path)).conversations(BadRows()))
    assert "{{" not in str(caught.value.hint)
