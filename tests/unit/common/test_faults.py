"""A save that is cut short at each of its system calls, in each way: nothing is lost."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qlora_cli.errors import TrainingError
from qlora_cli.optim.families import AdamW
from qlora_cli.runs.checkpoint import (
    load_checkpoint,
    newest_checkpoint,
    random_states,
    save_checkpoint,
)
from qlora_cli.types import TrainState

CALLS = ("open", "write", "fsync", "replace", "mkdir", "rmdir", "unlink")


class Killed(BaseException):
    """In the place of SIGKILL: nothing catches it, and nothing reaches the disk after it."""


class Faults:
    """Counts the system calls of a save; from the `at`-th on, `act` is done in their place."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, at: int, act: Callable[..., Any] | None
    ) -> None:
        self.count = 0
        for name in CALLS:
            monkeypatch.setattr(os, name, self._hooked(name, getattr(os, name), at, act))

    def _hooked(
        self, name: str, real: Callable[..., Any], at: int, act: Callable[..., Any] | None
    ) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            self.count += 1
            if act is not None and self.count >= at:
                return act(name, real, *arguments, **options)
            return real(*arguments, **options)

        return call


def kill(name: str, real: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    raise Killed


def fill_up(name: str, real: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    if name in ("rmdir", "unlink", "replace"):
        return real(*arguments, **options)
    if name == "open" and not arguments[1] & os.O_CREAT:
        return real(*arguments, **options)
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def write_half(name: str, real: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    if name == "write" and len(arguments[1]) > 1:
        return real(arguments[0], arguments[1][: len(arguments[1]) // 2])
    return fill_up(name, real, *arguments, **options)


class Run:
    """A small model with dropout: what it does next shows whether all of its state is back."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 1))
        self.optimizer = AdamW(learning_rate=1e-2).build(
            self.model.named_parameters(), torch.device("cpu")
        )
        self.scaler = torch.amp.GradScaler("cpu", enabled=False)
        self.state = TrainState()

    def step(self) -> float:
        loss = self.model(torch.randn(8, 4)).square().mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.state.step += 1
        return loss.item()

    def save(self, folder: Path) -> None:
        save_checkpoint(
            folder,
            model=self.model,
            optimizer=self.optimizer,
            scaler=self.scaler,
            state=self.state,
            random_states=[random_states()],
            keep=1,
        )

    def load_newest(self, folder: Path) -> None:
        self.state, _ = load_checkpoint(
            newest_checkpoint(folder),
            model=self.model,
            optimizer=self.optimizer,
            scaler=self.scaler,
        )


def first_save(folder: Path) -> tuple[Run, list[float]]:
    """A run that was saved after step 1 and has made step 2; and the losses of steps 1 to 5."""
    whole = Run()
    losses = [whole.step() for _ in range(5)]
    run = Run()
    run.step()
    run.save(folder)
    run.step()
    return run, losses


def number_of_calls(folder: Path) -> int:
    run, _ = first_save(folder)
    with pytest.MonkeyPatch.context() as monkeypatch:
        faults = Faults(monkeypatch, 0, None)
        run.save(folder)
    return faults.count


@pytest.mark.quick_every(3)
@pytest.mark.parametrize(
    ("act", "raised"), [(kill, Killed), (fill_up, TrainingError), (write_half, TrainingError)]
)
def test_a_save_that_fails_at_any_of_its_calls_loses_nothing(
    tmp_path: Path, act: Callable[..., Any], raised: type[BaseException]
) -> None:
    calls = number_of_calls(tmp_path / "counted")
    assert calls > 40
    survived = []
    for at in range(1, calls + 1):
        folder = tmp_path / str(at)
        run, losses = first_save(folder)
        with pytest.MonkeyPatch.context() as monkeypatch:
            Faults(monkeypatch, at, act)
            try:
                run.save(folder)
            except raised:
                pass
            else:
                assert raised is TrainingError, "a kill ends the save"
        resumed = Run()
        resumed.load_newest(folder)
        survived.append(resumed.state.step)
        assert [resumed.step() for _ in range(5 - survived[-1])] == losses[survived[-1] :]
        resumed.save(folder)  # what the fault left behind is in nobody's way
        assert newest_checkpoint(folder).name == "step-00000005"
        assert [path.name for path in folder.iterdir()] == ["step-00000005"]
    # Until the new one has its name, the old one is what there is.
    assert survived == sorted(survived)
    assert set(survived) == {1, 2}


@pytest.mark.parametrize("file", ["manifest", "state", "tensors", "weights"])
def test_a_damaged_byte_anywhere_in_a_checkpoint_is_seen(tmp_path: Path, file: str) -> None:
    names = {
        "manifest": "manifest.json",
        "state": "state.json",
        "tensors": "state.safetensors",
        "weights": "trained.safetensors",
    }
    run, _ = first_save(tmp_path)
    second = tmp_path / "kept"
    (tmp_path / "step-00000001").rename(second)
    run.save(tmp_path)
    second.rename(tmp_path / "step-00000001")
    path = tmp_path / "step-00000002" / names[file]
    content = path.read_bytes()
    for at in range(0, len(content), max(1, len(content) // 200)):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        assert newest_checkpoint(tmp_path).name == "step-00000001"
    path.write_bytes(content[:-1])
    assert newest_checkpoint(tmp_path).name == "step-00000001"
    path.unlink()
    assert newest_checkpoint(tmp_path).name == "step-00000001"
    (tmp_path / "elsewhere").write_bytes(content)
    path.symlink_to(tmp_path / "elsewhere")
    assert newest_checkpoint(tmp_path).name == "step-00000001"
    path.unlink()
    path.write_bytes(content)
    assert newest_checkpoint(tmp_path).name == "step-00000002"
