"""Folders of datasets' `save_to_disk` are read; those with several splits name them."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pytest

from qlora_cli.data.sources import BadRows, Source
from qlora_cli.errors import DataError


def save(folder: Path, *shards: list[str]) -> Path:
    """Write what `Dataset.save_to_disk` writes."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05}-of-{len(shards):05}.arrow" for i in range(len(shards))]
    for name, texts in zip(names, shards, strict=True):
        table = pyarrow.table({"text": texts})
        with pyarrow.ipc.new_stream(str(folder / name), table.schema) as file:
            file.write_table(table)
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "x"}
    (folder / "state.json").write_text(json.dumps(state), encoding="utf-8")
    (folder / "dataset_info.json").write_text('{"features": {}}', encoding="utf-8")
    return folder


def read(folder: Path) -> list[str]:
    source = Source.model_validate({"path": str(folder), "format": {"type": "text"}})
    assert len(source.digest()) == 64
    return [row.messages[0].content for row in source.conversations(BadRows())]


def test_a_saved_dataset_is_read_in_order(tmp_path: Path) -> None:
    assert read(save(tmp_path / "one", ["a", "b"])) == ["a", "b"]
    folder = save(tmp_path / "several", ["a", "b"], ["c"], ["d"])
    # Kept by `map`; not rows of this dataset.
    (folder / "cache-0123456789abcdef.arrow").write_bytes(b"x")
    assert read(folder) == ["a", "b", "c", "d"]


@pytest.mark.parametrize("name", ["state.json", "dataset_info.json"])
def test_one_of_its_files_about_the_rows_may_be_missing(tmp_path: Path, name: str) -> None:
    folder = save(tmp_path / "one", ["a"], ["b"])
    (folder / name).unlink()
    assert read(folder) == ["a", "b"]


def test_a_dataset_dict_names_its_splits(tmp_path: Path) -> None:
    folder = tmp_path / "both"
    save(folder / "train", ["a"])
    save(folder / "test", ["b"])
    (folder / "dataset_dict.json").write_text('{"splits": ["train", "test"]}', encoding="utf-8")
    with pytest.raises(DataError, match="with the splits test, train") as caught:
        read(folder)
    assert caught.value.hint == f"name the folder of one split: {folder / 'train'}"
    assert read(folder / "train") == ["a"]
    assert read(folder / "test") == ["b"]


def test_a_folder_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path / "cut", ["a"], ["b"])
    (folder / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(DataError, match=r"data-00001-of-00002\.arrow is missing"):
        read(folder)
    (folder / "state.json").write_text("{}", encoding="utf-8")
    with pytest.raises(DataError, match="does not name the files"):
        read(folder)


OTHERS = {
    "data alone": {"rows.jsonl": '{"text": "a"}'},
    "a state of its own": {"rows.jsonl": '{"text": "a"}', "state.json": '{"text": "b"}'},
    "an info file": {"rows.jsonl": '{"text": "a"}', "dataset_info.json": '[{"text": "b"}]'},
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_folders_are_read_as_before(tmp_path: Path, kind: str) -> None:
    for name, text in OTHERS[kind].items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    if kind == "a state of its own":
        with pytest.raises(DataError, match=r"state\.json"):
            read(tmp_path)
    else:
        assert "a" in read(tmp_path)


def test_a_split_named_train_is_proposed_first(tmp_path: Path) -> None:
    folder = tmp_path / "both"
    for name in ("dev", "train", "validation"):
        save(folder / name, ["a"])
    (folder / "dataset_dict.json").write_text("{}", encoding="utf-8")
    with pytest.raises(DataError) as caught:
        read(folder)
    assert str(caught.value.hint).endswith("/train")
