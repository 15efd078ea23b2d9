"""Rows longer than the model's context are named wherever the user looks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import exit_code, output_of

CONTEXT = 512
"""Positions of the tiny model, whose tokens are bytes."""


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Two rows that fit the context, and one that does not."""
    path = tmp_path / "long.jsonl"
    turns = [[("user", "say"), ("assistant", "a" * length)] for length in (20, 700, 30)]
    messages = [[{"role": role, "content": text} for role, text in row] for row in turns]
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in messages))
    return path


def settings(rows: Path, **data: Any) -> dict[str, Any]:
    return {"data": {"train": {"path": str(rows)}, "evaluation": None, "max_length": 2000, **data}}


def test_rows_beyond_the_context_are_named_by_each_command(
    write_recipe: Callable[..., Path], rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(**settings(rows), training={"max_steps": 1})
    assert exit_code("preview", recipe) == 0
    table = capsys.readouterr().out
    assert f"rows beyond the model's context ({CONTEXT})    1 of 3 (33.33%)\n  {rows}:2" in table
    assert exit_code("plan", recipe, "--device", "24GiB") == 0
    warnings = [line for line in capsys.readouterr().out.splitlines() if "model's context" in line]
    assert len(warnings) == 1
    assert warnings[0].startswith("warning: rows of up to 7")
    assert output_of(capsys, "plan", recipe, "--device", "24GiB")["context"] == CONTEXT
    assert exit_code("train", recipe, "-q") == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "context" in line]
    assert len(lines) == 1
    assert f"such as {rows}:2" in lines[0]
    assert f"--set data.max_length={CONTEXT}" in lines[0]


def test_nothing_is_said_of_rows_that_fit(
    write_recipe: Callable[..., Path], rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(**settings(rows, max_length=CONTEXT, max_lost=1))
    assert exit_code("preview", recipe) == 0
    assert f"beyond the model's context ({CONTEXT})    0 of 3" in capsys.readouterr().out
    assert exit_code("plan", recipe, "--device", "24GiB") == 0
    assert "model's context" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("max_length", "hint"),
    [(100, f"data.max_length: {CONTEXT}, the model's context, keeps 66.7% of the rows"), (600, "")],
)
def test_no_hint_goes_beyond_the_context(
    write_recipe: Callable[..., Path],
    rows: Path,
    capsys: pytest.CaptureFixture[str],
    max_length: int,
    hint: str,
) -> None:
    recipe = write_recipe(**settings(rows, max_length=max_length))
    assert exit_code("preview", recipe) == 2
    said = capsys.readouterr().err
    assert hint in said
    assert "keeps every row" not in said
    assert hint or "data.max_length:" not in said


def test_a_model_with_a_table_of_positions_refuses_longer_rows(
    write_recipe: Callable[..., Path],
    rows: Path,
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = shutil.copytree(tiny_model, tmp_path / "opt")
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    (base / "config.json").write_text(json.dumps({**config, "model_type": "opt"}))
    recipe = write_recipe(**settings(rows), model={"path": str(base)})
    assert exit_code("preview", recipe) == 2
    printed, said = capsys.readouterr()
    assert "1 of 3" in printed, "the table comes first"
    assert "it has no positions for them" in said
    assert f"hint: --set data.max_length={CONTEXT}" in said


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_virtual_tokens_are_taken_from_the_context(
    write_recipe: Callable[..., Path], rows: Path, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    """The longest row fits the context, but not with 20 virtual tokens before it."""
    turns = [{"role": "user", "content": "say"}, {"role": "assistant", "content": "a" * 475}]
    rows.write_text(json.dumps({"messages": turns}) + "\n", encoding="utf-8")
    longest = {"lora": 0, method: 1}
    for kind, number in longest.items():
        recipe = write_recipe(**settings(rows), adapter={"type": kind})
        assert exit_code("preview", recipe) == 0
        printed, said = capsys.readouterr()
        assert f"beyond the model's context ({CONTEXT - 20 * number})    {number} of 1" in printed
        warning = f"context of {CONTEXT - 20} tokens ({CONTEXT} less 20 virtual tokens), such as"
        assert (warning in said) == bool(number)
    assert output_of(capsys, "plan", recipe, "--device", "24GiB")["context"] == CONTEXT - 20


def test_a_warmup_longer_than_the_run_is_one_warning(
    write_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(
        schedule={"type": "cosine", "warmup_steps": 10}, training={"max_steps": 2}
    )
    line = (
        "schedule.warmup_steps (10) is more than the 2 steps of the run: the learning rate ends at "
        "20% of optimizer.learning_rate"
    )
    for command in (["validate", recipe], ["train", "-q", recipe]):
        assert exit_code(*command) == 0
        assert capsys.readouterr().err.splitlines().count(line) == 1
    assert exit_code("plan", recipe, "--device", "24GiB") == 0
    assert f"warning: {line}" in capsys.readouterr().out.splitlines()
