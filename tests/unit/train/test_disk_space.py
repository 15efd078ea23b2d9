from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_cli.errors import TrainingError
from qlora_cli.recipe.schema import Recipe
from qlora_cli.train.disk_space import DiskBudget, count_saves
from qlora_cli.train.train import train
from tests.conftest import each_optimizer, exit_code

MIB = 2**20
ROOM = DiskBudget(weights=10 * MIB, state=20 * MIB, keep=2, saves=9, has_best=True)


def test_the_fullest_moment_has_one_checkpoint_more_than_are_kept() -> None:
    assert ROOM.peak(2) == (3 * 30 + 2 * 10) * MIB
    assert DiskBudget(10, 20, keep=2, saves=9, has_best=False).peak(2) == 3 * 30 + 10
    assert DiskBudget(10, 20, keep=5, saves=2, has_best=False).peak(5) == 2 * 30 + 10


@pytest.mark.parametrize(
    ("max_steps", "save_every", "saves"), [(10, None, 1), (10, 5, 2), (10, 4, 3), (3, 10, 1)]
)
def test_the_last_step_is_saved_too(max_steps: int, save_every: int | None, saves: int) -> None:
    assert count_saves(max_steps, save_every) == saves


def test_exactly_enough_space_is_accepted() -> None:
    ROOM.require(110 * MIB, Path("run"))
    with pytest.raises(TrainingError):
        ROOM.require(110 * MIB - 1, Path("run"))


def test_the_error_names_the_sizes_and_a_setting_that_fits() -> None:
    with pytest.raises(TrainingError) as caught:
        ROOM.require(100 * MIB, Path("run"))
    assert "run has room for 100.0 MiB, and the run needs 110.0 MiB" in str(caught.value)
    assert "3 checkpoints of 30.0 MiB (output.keep_checkpoints is 2" in str(caught.value)
    assert "last and best weights of 10.0 MiB each" in str(caught.value)
    assert "output.keep_checkpoints=1 needs only 80.0 MiB" in str(caught.value.hint)
    with pytest.raises(TrainingError) as caught:
        ROOM.require(79 * MIB, Path("run"))
    assert "keep_checkpoints" not in str(caught.value.hint)


def test_a_run_larger_than_the_disk_is_refused_before_it_trains(
    write_recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(
        # So long a run would compile its kernels first.
        training={"max_steps": 10**13, "save_every": 1, "kernels": "plain"},
        output={"dir": str(tmp_path / "run"), "keep_checkpoints": 10**12},
    )
    assert exit_code("train", recipe) == 4
    told = capsys.readouterr().err
    assert "1,000,000,000,001 checkpoints of 0.0 MiB (" in told
    assert "output.keep_checkpoints is 1,000,000,000,000" in told
    assert "output.keep_checkpoints=1 needs only 0.1 MiB" in told
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.quick_every(4)
@pytest.mark.parametrize("optimizer", [one.type for one in each_optimizer()])
def test_a_checkpoint_is_about_as_large_as_budgeted(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path, optimizer: str
) -> None:
    """Any optimizer of the union, on weights of which most are in tensors of usual size."""
    recipe = tiny_recipe(
        adapter={"type": "lora", "r": 512},
        optimizer={"type": optimizer},
        training={"max_steps": 1},
    )
    record = train(recipe)
    number = record["trained_weights"]
    room = DiskBudget(
        4 * number, recipe.optimizer.state_bytes * number, keep=1, saves=1, has_best=False
    )
    [checkpoint] = (tmp_path / "run" / "checkpoints").iterdir()
    manifest = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))
    written = sum(file["bytes"] for file in manifest["files"].values())
    assert 0.8 * room.checkpoint < written < 1.1 * room.checkpoint
    weights = (tmp_path / "run" / "last" / "adapter_model.safetensors").stat().st_size
    assert weights == pytest.approx(room.weights, rel=0.05)
