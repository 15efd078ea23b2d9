import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from qlora_cli.errors import TrainingError
from qlora_cli.optim.families import AdamW
from qlora_cli.runs.checkpoint import (
    drop_old_checkpoints,
    load_checkpoint,
    newest_checkpoint,
    random_states,
    save_checkpoint,
    set_random_states,
    state_of_gpu,
)
from qlora_cli.types import TrainState
from tests.damage import DAMAGE

CPU = torch.device("cpu")


class Run:
    """A small model with everything that a checkpoint has to hold."""

    def __init__(self, optimizer: AdamW, width: int = 80) -> None:
        torch.manual_seed(0)
        # More than 4096 weights: below that bitsandbytes keeps 32-bit states.
        self.model = nn.Sequential(nn.Linear(width, width), nn.Dropout(0.5), nn.Linear(width, 1))
        self.model[2].requires_grad_(False)
        self.optimizer = optimizer.build(self.model.named_parameters(), CPU)
        self.scaler = torch.amp.GradScaler("cpu", enabled=False)
        self.state = TrainState()

    def steps(self, count: int) -> list[float]:
        losses = []
        for _ in range(count):
            noise = random.random() + np.random.rand()
            width = self.model[0].in_features
            loss = ((self.model(torch.randn(8, width)) - noise) ** 2).mean()
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.state.step += 1
            losses.append(loss.item())
        return losses

    def save(self, folder: Path, keep: int = 2) -> Path:
        return save_checkpoint(
            folder,
            model=self.model,
            optimizer=self.optimizer,
            scaler=self.scaler,
            state=self.state,
            random_states=[random_states()],
            keep=keep,
        )

    def load(self, path: Path) -> None:
        self.state, _ = load_checkpoint(
            path, model=self.model, optimizer=self.optimizer, scaler=self.scaler
        )


@pytest.mark.parametrize(
    "config", [AdamW(learning_rate=1e-2), AdamW(type="adamw_8bit", learning_rate=1e-2)]
)
def test_resuming_from_a_checkpoint_is_bit_identical(config: AdamW, tmp_path: Path) -> None:
    run = Run(config)
    run.steps(3)
    path = run.save(tmp_path)
    expected = run.steps(3)

    resumed = Run(config)
    resumed.steps(1)  # other weights, other random states
    resumed.load(path)
    assert resumed.state == TrainState(step=3)
    assert resumed.steps(3) == expected
    assert torch.equal(resumed.model[0].weight, run.model[0].weight)


def test_only_trained_weights_are_stored_and_nothing_is_pickled(tmp_path: Path) -> None:
    run = Run(AdamW())
    run.steps(1)
    path = run.save(tmp_path)
    assert {file.name for file in path.iterdir()} == {
        "manifest.json",
        "state.json",
        "state.safetensors",
        "trained.safetensors",
    }
    weights = run.model[0].weight.numel() + run.model[0].bias.numel()
    assert (path / "trained.safetensors").stat().st_size < 4 * weights + 500


def test_the_newest_are_kept(tmp_path: Path) -> None:
    run = Run(AdamW())
    for _ in range(4):
        run.steps(1)
        run.save(tmp_path, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]
    assert newest_checkpoint(tmp_path).name == "step-00000004"


def test_a_damaged_checkpoint_is_passed_over_by_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(AdamW(), width=8)
    older = run.save(tmp_path)
    run.steps(1)
    newest = run.save(tmp_path)
    files = sorted(newest.iterdir())
    assert len(files) == 4
    for file in files:
        written = file.read_bytes()
        for damage, change in [*DAMAGE.items(), ("removed", None)]:
            file.unlink() if change is None else file.write_bytes(change(written))
            caplog.clear()
            assert newest_checkpoint(tmp_path) == older, f"{file.name} {damage}"
            assert "step-00000001 is damaged" in caplog.text
        file.write_bytes(written)
        assert newest_checkpoint(tmp_path) == newest


def test_nothing_to_resume_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="no checkpoint in"):
        newest_checkpoint(tmp_path / "nowhere")


def test_a_checkpoint_of_other_weights_is_refused(tmp_path: Path) -> None:
    run = Run(AdamW())
    run.steps(1)
    path = run.save(tmp_path)
    with pytest.raises(TrainingError, match="other trained weights"):
        Run(AdamW(), width=81).load(path)


def test_a_save_that_was_cut_short_leaves_no_checkpoint(tmp_path: Path) -> None:
    run = Run(AdamW())
    run.steps(1)
    path = run.save(tmp_path)
    # What a kill in the middle of a save leaves behind.
    shutil.move(path, tmp_path / f".{path.name}.unfinished")
    with pytest.raises(TrainingError):
        newest_checkpoint(tmp_path)
    assert newest_checkpoint(run.save(tmp_path).parent) == path


def test_a_finished_run_removes_the_checkpoints_that_its_last_save_left(
    tmp_path: Path,
) -> None:
    run = Run(AdamW())
    for _ in range(4):
        run.steps(1)
        run.save(tmp_path, keep=4)
    (tmp_path / "step-00000001").rename(tmp_path / ".step-00000001.removed")
    drop_old_checkpoints(tmp_path, 4, keep=2)
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000003", "step-00000004"}


def test_a_rolled_back_run_keeps_no_later_checkpoint(tmp_path: Path) -> None:
    run = Run(AdamW())
    for _ in range(4):
        run.steps(1)
        run.save(tmp_path, keep=4)
    old = (tmp_path / "step-00000003" / "trained.safetensors").read_bytes()
    run.load(tmp_path / "step-00000002")
    run.optimizer.param_groups[0]["lr"] *= 2  # as after a change of max_steps
    run.steps(1)
    path = run.save(tmp_path, keep=4)
    assert newest_checkpoint(tmp_path) == path == tmp_path / "step-00000003"
    assert (path / "trained.safetensors").read_bytes() != old


@pytest.mark.parametrize(
    ("saved", "index", "chosen"),
    [
        (1, 0, 0),
        (1, 3, 0),  # the state of this process, which computed on another card before
        (8, 0, 0),  # checkpoints used to hold the states of all visible cards
        (8, 3, 3),
        (2, 5, 0),
    ],
)
def test_the_random_state_of_a_gpu_is_found_where_other_gpus_are_visible(
    saved: int, index: int, chosen: int
) -> None:
    states = [torch.full((4,), number) for number in range(saved)]
    assert state_of_gpu(states, index)[0] == chosen


def test_the_states_of_other_gpus_are_not_saved(tmp_path: Path) -> None:
    found = random_states()
    assert len(found["cuda"]) == (1 if torch.cuda.is_initialized() else 0)
    # Nor do those of a machine with several matter on one without.
    set_random_states({**found, "cuda": [torch.zeros(16, dtype=torch.uint8)] * 8})
