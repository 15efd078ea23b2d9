"""`qlora eval --harness` on a tiny model, with a local task."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import exit_code, output_of

needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="no lm-eval: pip install 'qlora[harness]'"
)

ROWS = [
    {"q": f"Which of them is number {i}?", "choices": ["alpha", "be", "gamma ray"], "answer": i % 3}
    for i in range(12)
]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows_to_ask.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return path


@pytest.fixture
def task_folder(tmp_path: Path, rows: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    task = {
        "task": "which",
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(rows)}, "cache_dir": str(tmp_path / "datasets"),
        },
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": True}
            for name in ("acc", "acc_bytes")
        ],
    }  # fmt: skip
    (folder / "which.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
    return folder


@needs_harness
# What the harness and its libraries warn of is not ours to mend.
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("as_chat", [True, False])
def test_the_harness_counts_what_our_task_counts(
    write_recipe: Callable[..., Path],
    tmp_path: Path,
    rows: Path,
    task_folder: Path,
    capsys: pytest.CaptureFixture[str],
    as_chat: bool,
) -> None:
    own: dict[str, Any] = {
        "type": "multiple_choice", "question": "{{ q }}", "data": {"path": str(rows)},
        "as_chat": as_chat,
    }  # fmt: skip
    recipe = write_recipe(evaluation={"tasks": [own], "batch_size": 4})
    assert exit_code("train", recipe) == 0
    run = tmp_path / "run"
    ours = output_of(capsys, "eval", run, "--tasks", "multiple_choice")["models"]["tuned"]
    plain = [] if as_chat else ["--harness-plain"]
    theirs = output_of(
        capsys, "eval", run, "--harness", "which", "--harness-path", task_folder, *plain
    )
    assert theirs["as_chat"] is as_chat
    found = theirs["tasks"]["which"]
    assert found["acc,none"] == ours["multiple_choice"]["value"]
    if as_chat:
        # It takes the line break that ends the prompt into each option, before it divides.
        return
    assert found["acc_bytes,none"] == ours["multiple_choice.normalized"]["value"]


@needs_harness
# As above.
@pytest.mark.filterwarnings("default")
def test_a_task_that_the_harness_does_not_have_is_refused(
    write_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code("eval", write_recipe(), "--harness", "no_such_task") == 2
    assert "has no task no_such_task" in capsys.readouterr().err


def test_a_missing_harness_is_reported_with_its_install_command(
    write_recipe: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert exit_code("eval", write_recipe(), "--harness", "arc_easy") == 2
    assert 'pip install "qlora[harness]"' in capsys.readouterr().err
    assert exit_code("eval", write_recipe(), "--harness", "a", "--tasks", "loss") == 2
