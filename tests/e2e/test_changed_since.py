"""Inputs that changed since a run started: refused by name, or allowed and recorded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from qlora_cli.recipe.load import load_recipe
from tests.conftest import CHATML, exit_code, output_of, save_tiny_model

WEIGHTS = "last/adapter_model.safetensors"


def rows(run: Path) -> list[dict[str, Any]]:
    """Read the logged training steps."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if "loss" in row]


@pytest.fixture
def start(
    write_recipe: Callable[..., Path], tmp_path: Path
) -> Callable[..., tuple[Path, Path, Path]]:
    """Train two steps; return the recipe, the run and its own copy of the base model."""

    def make(**sections: Any) -> tuple[Path, Path, Path]:
        base = save_tiny_model(tmp_path / "base")
        sections = {"training": {"max_steps": 2}, "adapter": {"dropout": 0.1}, **sections}
        recipe = write_recipe(model={"path": str(base)}, **sections)
        assert exit_code("train", recipe) == 0
        return recipe, tmp_path / "run", base

    return make


def other_weights(base: Path) -> None:
    """Replace the weights by others of the same shapes, like those of an instruct variant."""
    shutil.rmtree(base)
    save_tiny_model(base, initializer_range=0.1)


def other_tokens(base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"pad_token": "!"})
    tokenizer.save_pretrained(base)


def other_template(base: Path) -> None:
    """Change the template's text but not how it renders the rows of the test."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = CHATML + "{% if false %}{% endif %}"
    tokenizer.save_pretrained(base)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (other_weights, "the weights of model.path: "),
        (other_tokens, "the tokenizer: "),
        (other_template, "the chat template: "),
    ],
)
def test_another_model_tokenizer_or_template_is_refused(
    start: Callable[..., tuple[Path, Path, Path]],
    capsys: pytest.CaptureFixture[str],
    change: Callable[[Path], None],
    named: str,
) -> None:
    recipe, run, base = start()
    before = (run / "run.json").read_bytes()
    change(base)
    allow = ("--allow", "model.path", "--allow", "data.chat_template")
    assert exit_code("train", recipe, "--resume", "auto", *allow) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if named in line]
    old, new = line.removeprefix(named).split(" -> ")
    assert len(old) == len(new) == 12
    assert old != new
    assert (run / "run.json").read_bytes() == before


def test_other_held_out_rows_are_refused(
    start: Callable[..., tuple[Path, Path, Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, _, _ = start()
    override = "data.evaluation.limit=5"
    assert exit_code("train", recipe, "--resume", "auto", "--set", override) == 2
    told = capsys.readouterr().err
    assert "data.evaluation.limit: 6 -> 5" in told
    assert "the rows of data.evaluation: " in told
    assert "the rows of data.train" not in told


def test_editing_the_saved_recipe_is_a_change(
    start: Callable[..., tuple[Path, Path, Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    _, run, _ = start()
    saved = run / "recipe.yaml"
    text = saved.read_text(encoding="utf-8")
    assert "weight_decay: 0.0" in text
    saved.write_text(text.replace("weight_decay: 0.0", "weight_decay: 0.5"), encoding="utf-8")
    assert load_recipe(saved).recipe.optimizer.weight_decay == 0.5
    assert exit_code("train", saved, "--resume", "auto") == 2
    told = capsys.readouterr().err
    assert "optimizer.weight_decay: 0.0 -> 0.5" in told
    assert "--allow optimizer.weight_decay resumes with the new values" in told


def test_allowed_changes_apply_from_the_resumed_step_and_are_recorded(
    start: Callable[..., tuple[Path, Path, Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, run, _ = start(optimizer={"weight_decay": 0.1})
    changed = [
        "--set", "optimizer.learning_rate=1e-3", "--set", "optimizer.weight_decay=0",
        "--set", "schedule.warmup_steps=8", "--set", "training.max_steps=4",
    ]  # fmt: skip
    allow = ["--allow", "optimizer.learning_rate", "--allow", "optimizer.weight_decay"]
    assert exit_code("train", recipe, "--resume", "auto", *changed, *allow) == 2
    told = capsys.readouterr().err
    assert "schedule.warmup_steps: 0 -> 8" in told
    assert "learning_rate" not in told.partition("hint")[0]

    record = output_of(
        capsys, "train", recipe, "--resume", "auto", *changed, *allow, "--allow", "schedule"
    )
    rates = [row["learning_rate"] for row in rows(run)]
    assert rates == pytest.approx([1e-2, 1e-2, 1e-3 * 3 / 8, 1e-3 * 4 / 8], rel=1e-12)
    [resumed] = record["resumed"]
    assert resumed["step"] == 2
    assert resumed["changes"] == {
        "optimizer.learning_rate": [1e-2, 1e-3],
        "optimizer.weight_decay": [0.1, 0.0],
        "schedule.warmup_steps": [0, 8],
        "training.max_steps": [2, 4],
    }
    state = (run / "checkpoints" / "step-00000004" / "state.json").read_text(encoding="utf-8")
    assert '["weight_decay", 0.0]' in state
    assert '["weight_decay", 0.1]' not in state


def test_moved_model_and_rows_resume_bit_for_bit(
    start: Callable[..., tuple[Path, Path, Path]], tmp_path: Path
) -> None:
    recipe, run, base = start()
    assert exit_code("train", recipe, "--resume", "2", "--set", "training.max_steps=4") == 0
    expected = (run / WEIGHTS).read_bytes()
    base.rename(tmp_path / "moved")
    (tmp_path / "rows.jsonl").rename(tmp_path / "other.jsonl")
    keys = {
        "model.path": tmp_path / "moved",
        "data.train.path": tmp_path / "other.jsonl",
        "data.evaluation.path": tmp_path / "other.jsonl",
    }
    moved = [word for key, path in keys.items() for word in ("--set", f"{key}={path}")]
    moved += ["--set", "training.max_steps=4"]
    assert exit_code("train", recipe, "--resume", "2", *moved) == 2
    (run / WEIGHTS).unlink()
    allow = [word for key in keys for word in ("--allow", key)]
    assert exit_code("train", recipe, "--resume", "2", *moved, *allow) == 0
    assert (run / WEIGHTS).read_bytes() == expected


@pytest.mark.parametrize("key", ["adapter.r", "quantization.type", "data.max_length", "nonsense"])
def test_unsafe_changes_cannot_be_allowed(
    start: Callable[..., tuple[Path, Path, Path]], capsys: pytest.CaptureFixture[str], key: str
) -> None:
    recipe, _, _ = start()
    assert exit_code("train", recipe, "--resume", "auto", "--allow", key) == 2
    told = capsys.readouterr().err
    assert f"--allow: {key} cannot be allowed" in told
    assert "optimizer.learning_rate" in told


def test_allow_needs_resume(
    write_recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code("train", write_recipe(), "--allow", "model.path") == 2
    assert "hint: add --resume" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_an_extended_run_follows_the_longer_schedule(
    start: Callable[..., tuple[Path, Path, Path]], schedule: str
) -> None:
    recipe, run, _ = start(schedule={"type": schedule})
    assert exit_code("train", recipe, "--resume", "auto", "--set", "training.max_steps=6") == 0
    settings = load_recipe(recipe).recipe
    scales = [settings.schedule.scale(step, 2) for step in range(2)]
    scales += [settings.schedule.scale(step, 6) for step in range(2, 6)]
    rates = [row["learning_rate"] for row in rows(run)]
    assert rates == pytest.approx([1e-2 * scale for scale in scales], rel=1e-12)
    assert min(rates) > 0
    assert rates[2] > rates[1], "it had fallen lower at the end of the shorter run"


def test_extending_the_epochs_equals_an_uninterrupted_run(
    start: Callable[..., tuple[Path, Path, Path]], tmp_path: Path
) -> None:
    passes = {"max_steps": None, "epochs": 1}
    recipe, run, _ = start(training=passes)
    assert exit_code("train", recipe, "--resume", "auto", "--set", "training.epochs=2") == 0
    whole = ("--set", "training.epochs=2", "--set", f"output.dir={tmp_path / 'whole'}")
    assert exit_code("train", recipe, *whole) == 0
    assert [row["loss"] for row in rows(run)] == [row["loss"] for row in rows(tmp_path / "whole")]
    assert (run / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()
