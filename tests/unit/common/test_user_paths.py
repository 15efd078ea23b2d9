"""Paths that users write."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora_cli.common.user_paths import expand_path


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", "/home/ann")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("~/runs", "/home/ann/runs"),
        ("~", "/home/ann"),
        ("runs/mine", "runs/mine"),
        ("/data/*.jsonl", "/data/*.jsonl"),
        ("owner/model-1.0", "owner/model-1.0"),
        ("runs/v1~2", "runs/v1~2"),
        ("./~runs", "./~runs"),
        ("cost in $", "cost in $"),
    ],
)
def test_a_home_folder_is_expanded_and_nothing_else(text: str, path: str) -> None:
    assert expand_path(text) == path
    assert expand_path(path) == path


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("$SCRATCH/runs", "$SCRATCH"),
        ("${SCRATCH}/runs", "${SCRATCH}"),
        ("/data/$USER/rows.jsonl", "$USER"),
        ("runs-$1", "$1"),
        ("~/$X", "$X"),
        ("~nobody-here/runs", "~nobody-here"),
    ],
)
def test_what_a_shell_would_fill_in_is_refused(text: str, named: str) -> None:
    with pytest.raises(ValueError, match="write the path out") as caught:
        expand_path(text)
    assert named in str(caught.value)


@pytest.mark.parametrize("name", ["$HOME", "~nobody-here", "a$B"])
def test_a_file_of_that_name_is_meant(name: str) -> None:
    Path(name).touch()
    assert expand_path(name) == name
