"""A new run that begins with the weights of an earlier adapter."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_cli.common.digests import DIGESTS
from tests.conftest import exit_code, output_of, save_tiny_model

WEIGHTS = "last/adapter_model.safetensors"


def evaluated(run: Path) -> list[float]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row["eval_loss"] for row in map(json.loads, lines) if "eval_loss" in row]


@pytest.fixture
def begin(write_recipe: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """Write a recipe whose run is called `name`, with an adapter of these settings."""

    def make(name: str, parent: Path | None = None, **sections: Any) -> Path:
        start = {} if parent is None else {"init_from": str(parent)}
        adapter = {"dropout": 0.1, **start, **sections.pop("adapter", {})}
        return write_recipe(adapter=adapter, output={"dir": str(tmp_path / name)}, **sections)

    return make


@pytest.fixture
def parent(begin: Callable[..., Path], tmp_path: Path) -> Path:
    """A run of four steps."""
    assert exit_code("train", begin("parent")) == 0
    return tmp_path / "parent"


@pytest.mark.quick_every(5)
@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("settings", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {}])
def test_a_new_run_starts_from_its_parents_weights(
    begin: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    settings: dict[str, Any],
    quantization: str,
) -> None:
    sections = {"adapter": settings, "quantization": {"type": quantization}}
    assert exit_code("train", begin("first", **sections)) == 0
    first, second = tmp_path / "first", tmp_path / "second"
    record = output_of(capsys, "train", begin("second", first, **sections))
    before, after = evaluated(first), evaluated(second)
    assert after[0] == before[-1]
    assert after[-1] < after[0] < before[0]
    # With an optimizer of its own, from step 0.
    assert record["steps"] == 4
    digest = hashlib.sha256((first / WEIGHTS).read_bytes()).hexdigest()
    assert record["parent"] == {
        "name": "first", "weights": "last", "digest": digest, "parent": None,
    }  # fmt: skip


def test_the_chain_of_parents_is_recorded_without_paths(
    begin: Callable[..., Path], parent: Path, tmp_path: Path
) -> None:
    assert exit_code("train", begin("second", parent / "best")) == 0
    assert exit_code("train", begin("third", tmp_path / "second")) == 0
    record = json.loads((tmp_path / "third" / "run.json").read_text(encoding="utf-8"))
    assert record["parent"]["name"] == "second"
    assert record["parent"]["parent"]["name"] == "parent"
    assert record["parent"]["parent"]["weights"] == "best"
    card = (tmp_path / "third" / "last" / "README.md").read_text(encoding="utf-8")
    [line] = [line for line in card.splitlines() if line.startswith("| began from |")]
    assert f"second (last weights, sha256 {record['parent']['digest'][:12]})" in line
    assert "which began from parent (best weights, sha256 " in line
    assert str(tmp_path) not in card


def test_a_plain_adapter_can_be_a_parent(
    begin: Callable[..., Path], parent: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(parent / "last", tmp_path / "alone")
    record = output_of(capsys, "train", begin("second", tmp_path / "alone"))
    assert evaluated(tmp_path / "second")[0] == evaluated(parent)[-1]
    assert (record["parent"]["name"], record["parent"]["weights"]) == ("alone", None)


def test_a_resumed_run_does_not_need_its_parent(
    begin: Callable[..., Path], parent: Path, tmp_path: Path
) -> None:
    recipe = begin("second", parent, training={"save_every": 1})
    assert exit_code("train", recipe) == 0
    run = tmp_path / "second"
    expected, before = (run / WEIGHTS).read_bytes(), evaluated(run)
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    shutil.rmtree(parent)
    assert exit_code("train", recipe, "--resume", "3") == 0
    assert (run / WEIGHTS).read_bytes() == expected
    assert evaluated(run) == before
    again = json.loads((run / "run.json").read_text(encoding="utf-8"))
    assert again["parent"] == record["parent"]


def test_other_settings_are_refused_all_at_once(
    begin: Callable[..., Path], parent: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = {"r": 8, "alpha": 4, "use_rslora": True, "target_modules": ["q_proj"]}
    assert exit_code("train", begin("second", parent, adapter=changed)) == 3
    told = capsys.readouterr().err
    for line in (
        "adapter.r: 4 -> 8",
        "adapter.alpha: 8.0 -> 4.0",
        "adapter.use_rslora: False -> True",
        "-> 2 q_proj",
    ):
        assert line in told
    assert not (tmp_path / "second" / "metrics.jsonl").exists()
    # Selecting the same modules by another pattern is not a difference.
    named = {"target_modules": r".*\.(self_attn|mlp)\.\w+_proj"}
    assert exit_code("train", begin("third", parent, adapter=named)) == 0


def test_another_base_is_refused_before_it_is_loaded(
    begin: Callable[..., Path], parent: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = save_tiny_model(tmp_path / "other", initializer_range=0.1)
    assert exit_code("train", begin("second", parent, model={"path": str(other)})) == 3
    assert "has other weights (" in capsys.readouterr().err


def damage_missing(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[sorted(tensors)[0]]


def damage_unexpected(tensors: dict[str, torch.Tensor]) -> None:
    name = sorted(tensors)[0]
    tensors[name.replace("layers.0", "layers.7")] = tensors[name].clone()


def damage_shape(tensors: dict[str, torch.Tensor]) -> None:
    name = sorted(tensors)[0]
    tensors[name] = tensors[name][:, :-1].contiguous()


def damage_value(tensors: dict[str, torch.Tensor]) -> None:
    tensors[sorted(tensors)[0]].view(-1)[0] = float("nan")


@pytest.mark.quick_every(2)
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_missing, "missing: "),
        (damage_unexpected, "3 down_proj"),
        (damage_shape, "wrong shape: "),
        (damage_value, "not finite"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    begin: Callable[..., Path],
    parent: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[dict[str, torch.Tensor]], None],
    message: str,
) -> None:
    tensors = load_file(parent / WEIGHTS)
    damage(tensors)
    save_file(tensors, parent / WEIGHTS)
    (parent / WEIGHTS).with_name(DIGESTS).unlink()
    assert exit_code("train", begin("second", parent)) == 3
    told = capsys.readouterr().err
    assert message in told
    assert "Traceback" not in told


def test_a_missing_parent_is_named(
    begin: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code("train", begin("second", tmp_path / "nowhere")) == 2
    assert "nowhere: no adapter" in capsys.readouterr().err
