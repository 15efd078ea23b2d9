"""Checkpoints: all that is needed to go on as if nothing had happened. Nothing is pickled."""

from __future__ import annotations

import dataclasses
import json
import logging
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from qlora_cli.common.atomic_files import (
    atomic_folder,
    describe_file,
    remove_folder,
    write_file,
    write_json,
)
from qlora_cli.common.safetensors_writer import file_of
from qlora_cli.common.untrusted_files import read_object
from qlora_cli.errors import TrainingError
from qlora_cli.runs.optimizer_state_check import check_optimizer
from qlora_cli.types import TrainState

log = logging.getLogger("qlora")

_MANIFEST = "manifest.json"
_WEIGHTS, _TENSORS, _TREE = "trained.safetensors", "state.safetensors", "state.json"
_FILES = (_WEIGHTS, _TENSORS, _TREE)
_FORMAT = 1
_SETTINGS = ("initial_lr", "weight_decay")
"""Of a group of an optimizer: what a run that goes on may have another value of (`--allow`)."""


def save_checkpoint(
    folder: Path,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    state: TrainState,
    random_states: list[dict[str, Any]],
    keep: int,
) -> Path:
    """Write `folder/step-N`, whole or not at all; then drop all but the newest `keep`.

    The trained weights, the optimizer, the random generators, the state of the loop. The position
    in the data is a function of the step, and so is the learning rate. Older checkpoints go only
    when the new one has been read back from the disk and found to be what was written.

    Args:
        random_states: of each rank, by `random_states`.

    Raises:
        TrainingError: a trained weight is not finite, or the disk does not take it; what was saved
            before is untouched.
    """
    refuse_non_finite(model, state.step)
    path = folder / f"step-{state.step:08d}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _clear_unfinished(folder)
        with atomic_folder(path, replace=True) as unfinished:
            _write(unfinished, model, optimizer, scaler, state, random_states)
        if not is_whole(path):
            raise TrainingError(
                f"{path} was written, and reads otherwise than it was written: the disk cannot be "
                "trusted; older checkpoints are untouched",
                hint="--resume auto goes on from an older one; train on another disk",
            )
        _drop_old(folder, path, keep)
    except OSError as error:
        raise TrainingError(
            f"the checkpoint of step {state.step} cannot be written: {path}: {error.strerror}; "
            "what was saved before is untouched",
            hint="make room (output.keep_checkpoints=1 keeps one), then go on with --resume auto",
        ) from error
    return path


def _write(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    state: TrainState,
    random_states: list[dict[str, Any]],
) -> None:
    tensors: dict[str, Tensor] = {}
    tree = _pack(
        {
            "state": dataclasses.asdict(state),
            "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(),
            "random": random_states,
        },
        "",
        tensors,
    )
    files = {
        _WEIGHTS: write_file(folder / _WEIGHTS, file_of(_trained(model))),
        _TENSORS: write_file(folder / _TENSORS, file_of(tensors)),
        _TREE: write_json(folder / _TREE, tree),
    }
    # Last: a folder without a manifest that agrees with it is no checkpoint.
    write_json(folder / _MANIFEST, {"format": _FORMAT, "files": files})


def drop_old_checkpoints(folder: Path, step: int, keep: int) -> None:
    """Remove all but the newest `keep` up to a step, and what saves that were cut short left.

    Raises:
        TrainingError: the disk does not let them go.
    """
    try:
        _clear_unfinished(folder)
        _drop_old(folder, folder / f"step-{step:08d}", keep)
    except OSError as error:
        raise TrainingError(
            f"older checkpoints in {folder} cannot be removed: {error}",
            hint="see who may write there, then go on with --resume auto",
        ) from error


def _clear_unfinished(folder: Path) -> None:
    for left in folder.glob(".step-*"):
        shutil.rmtree(left)


def _drop_old(folder: Path, newest: Path, keep: int) -> None:
    """Those of later steps go too: of a run that was taken back, which may go another way now."""
    kept = 1
    for path in sorted(folder.glob("step-*"), reverse=True):
        if path == newest:
            continue
        if path.name < newest.name and kept < keep and _has_its_files(path):
            kept += 1
        else:
            remove_folder(path)


def load_checkpoint(
    path: Path,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    rank: int = 0,
    world_size: int = 1,
) -> tuple[TrainState, bool]:
    """Put a checkpoint's weights, optimizer and random states in place.

    Returns:
        The state of the loop; and whether the random states are as they were, which is so on as
        many ranks as it was written on.

    Raises:
        TrainingError: it was written for another set of trained weights, or cannot be read.
    """
    try:
        saved = load_file(path / _WEIGHTS)
        tree = json.loads((path / _TREE).read_text(encoding="utf-8"))
        values = _unpack(tree, load_file(path / _TENSORS))
        state = _state_of(values["state"])
        live = _trained(model)
        if {k: v.shape for k, v in saved.items()} != {k: v.shape for k, v in live.items()}:
            changed = sorted(set(saved) ^ set(live)) or sorted(saved)
            raise TrainingError(
                f"{path} was written for other trained weights (such as {changed[0]})",
                hint="resume with the recipe of the run: qlora train RUN/recipe.yaml --resume auto",
            )
        check_optimizer(values["optimizer"], optimizer)
        with torch.no_grad():
            for name, tensor in live.items():
                tensor.copy_(saved[name])
        _load_optimizer(optimizer, values["optimizer"])
        scaler.load_state_dict(values["scaler"])
        is_same_world = len(values["random"]) == world_size
        if is_same_world:
            set_random_states(values["random"][rank])
    except (
        OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError,
        ArithmeticError, RecursionError, SafetensorError,
    ) as error:  # fmt: skip
        raise TrainingError(
            f"{path} cannot be read as a checkpoint: {type(error).__name__}: {error}",
            hint="--resume STEP goes on from another one",
        ) from error
    return state, is_same_world


def _state_of(values: dict[str, Any]) -> TrainState:
    state = TrainState(**values)
    numbers = (state.step, state.tokens, 0 if state.best_step is None else state.best_step)
    if not all(type(one) is int and one >= 0 for one in numbers):
        raise ValueError(f"{state} is no state of a run")
    if not isinstance(state.best_value, float | None):
        raise ValueError(f"{state} is no state of a run")
    return state


def _load_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Its state as it was, its settings as the recipe has them now (they may be changed)."""
    settings = [{name: group[name] for name in _SETTINGS} for group in optimizer.param_groups]
    optimizer.load_state_dict(saved)
    for group, now in zip(optimizer.param_groups, settings, strict=True):
        group.update(now)


def refuse_non_finite(model: nn.Module, step: int) -> None:
    """Raises TrainingError if a trained weight is NaN or infinite."""
    bad = [name for name, tensor in _trained(model).items() if not tensor.isfinite().all()]
    if bad:
        raise TrainingError(
            f"step {step}: {len(bad)} trained tensors are not finite (such as {bad[0]}); they "
            "were not saved, and what was saved before is untouched",
            hint="try a lower optimizer.learning_rate, or training.max_grad_norm=1",
        )


def find_checkpoint(folder: Path, which: str) -> Path:
    """What `--resume` names.

    Args:
        folder: the run's checkpoints.
        which: "auto" for the newest that is whole; a step; or the path of one of them.

    Raises:
        TrainingError: it is not there, or damaged.
    """
    if which == "auto":
        return newest_checkpoint(folder)
    path = folder / f"step-{int(which):08d}" if which.isdecimal() else Path(which)
    if path.resolve().parent == folder.resolve() and is_whole(path):
        return path
    state = "is damaged" if path.exists() else "does not exist"
    if path.resolve().parent != folder.resolve():
        state = f"is no checkpoint of this run, which has them in {folder}"
    steps = [str(int(p.name[5:])) for p in sorted(folder.glob("step-*")) if is_whole(p)]
    raise TrainingError(
        f"--resume: {path} {state}",
        hint=f"there are steps {', '.join(steps)}" if steps else "there is none that is whole",
    )


def newest_checkpoint(folder: Path) -> Path:
    """The newest checkpoint that is whole. Damaged ones are named and passed over.

    Raises:
        TrainingError: there is none.
    """
    for path in sorted(folder.glob("step-*"), reverse=True):
        if is_whole(path):
            return path
        log.warning("%s is damaged; passed over", path)
    raise TrainingError(
        f"--resume: no checkpoint in {folder}",
        hint="nothing was saved: remove the run's folder and start without --resume; "
        "training.save_every sets how often a checkpoint is written",
    )


def is_whole(path: Path) -> bool:
    """Whether the files of a checkpoint are those that were written, byte for byte."""
    files = _manifest(path)
    try:
        return files is not None and all(
            describe_file(path / name) == described for name, described in files.items()
        )
    except OSError:
        return False


def _has_its_files(path: Path) -> bool:
    files = _manifest(path)
    try:
        return files is not None and all(
            (path / name).stat().st_size == described["bytes"] for name, described in files.items()
        )
    except OSError:
        return False


def _manifest(path: Path) -> dict[str, dict[str, Any]] | None:
    """What a checkpoint says of its files; None if it cannot be believed.

    The names are known, so nothing that a manifest says leads out of the folder; nor does a link.
    """
    here = [path / name for name in (_MANIFEST, *_FILES)]
    # No pipe either, which would be waited for without end.
    if any(file.is_symlink() for file in (path, *here)) or not all(f.is_file() for f in here):
        return None
    try:
        manifest = read_object(path / _MANIFEST)
        files = {name: manifest["files"][name] for name in _FILES}
        is_ours = manifest["format"] == _FORMAT and files == manifest["files"]
        return files if is_ours and all("bytes" in one for one in files.values()) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _trained(model: nn.Module) -> dict[str, Tensor]:
    """Trained weights, and what else the modules have in their state that hold them."""
    found = {
        name: parameter.detach()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    for owner in sorted({name.rpartition(".")[0] for name in found}):
        module = model.get_submodule(owner)
        kept = module.state_dict().keys()
        buffers = module.named_buffers(owner, recurse=False)
        found.update((name, one) for name, one in buffers if name.rpartition(".")[2] in kept)
    return found


def random_states() -> dict[str, Any]:
    """Of every generator that training draws from, in this process."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_states(states: dict[str, Any]) -> None:
    """Put them back: `states` as `random_states` gave them, arrays as such or as tensors."""
    random.setstate(states["python"])
    numpy_state = states["numpy"]
    inner = numpy_state["state"]
    np.random.set_state({**numpy_state, "state": {**inner, "key": np.asarray(inner["key"])}})
    torch.set_rng_state(states["torch"])
    if states["cuda"]:
        torch.cuda.set_rng_state_all(states["cuda"])


def _pack(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """A JSON tree for `value`; its tensors are put into `tensors` under their path.

    Containers are written as {kind: items}, because JSON knows no tuples and no integer keys.
    """
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value)
    if isinstance(value, Tensor):
        # A copy: safetensors refuses tensors that share memory, as 8-bit optimizers' maps do.
        tensors[path] = value.detach().cpu().clone().contiguous()
        return {"tensor": path}
    if isinstance(value, dict):
        items = value.items()
        return {"dict": [[key, _pack(item, f"{path}/{key}", tensors)] for key, item in items]}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_pack(item, f"{path}/{i}", tensors) for i, item in enumerate(value)]}
    assert value is None or isinstance(value, bool | int | float | str), f"{path}: {type(value)}"
    return value


def _unpack(tree: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(tree, dict):
        return tree
    ((kind, items),) = tree.items()
    if kind == "tensor":
        return tensors[items]
    if kind == "dict":
        return {key: _unpack(item, tensors) for key, item in items}
    values = [_unpack(item, tensors) for item in items]
    return values if kind == "list" else tuple(values)
