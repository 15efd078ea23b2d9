"""Checkpoints: everything needed to resume with the same results. Nothing is pickled."""

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
from qlora_cli.optim.base import load_states
from qlora_cli.runs.optimizer_state_check import check_optimizer
from qlora_cli.types import TrainState

log = logging.getLogger("qlora")

_MANIFEST = "manifest.json"
_WEIGHTS, _TENSORS, _TREE = "trained.safetensors", "state.safetensors", "state.json"
_FILES = (_WEIGHTS, _TENSORS, _TREE)
_FORMAT = 1
_SETTINGS = ("initial_lr", "weight_decay")
"""Settings of an optimizer group that a resumed run may change (`--allow`)."""


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
    """Write `folder/step-N` atomically; then delete all but the newest `keep`.

    A checkpoint holds the trained weights, the optimizer, the random generators and the state of
    the loop. The position in the data and the learning rate are functions of the step. Older
    checkpoints are deleted only after the new one has been read back and verified.

    Args:
        random_states: those of each rank, from `random_states()`.

    Raises:
        TrainingError: a trained weight is not finite, or the disk failed; existing checkpoints are
            untouched.
    """
    refuse_non_finite(model, state.step)
    path = folder / f"step-{state.step:08d}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _clear_unfinished(folder)
        with atomic_folder(path, replace=True) as unfinished:
            _write(unfinished, model, optimizer, scaler, state, random_states)
        if not is_intact(path):
            raise TrainingError(
                f"{path}: what is read back differs from what was written: the disk is faulty; "
                "older checkpoints are untouched",
                hint="train on another disk; --resume auto resumes from an older checkpoint",
            )
        _drop_old(folder, path, keep)
    except OSError as error:
        raise TrainingError(
            f"the checkpoint of step {state.step} cannot be written: {path}: {error.strerror}; "
            "existing checkpoints are untouched",
            hint="free disk space (output.keep_checkpoints=1 keeps one), then use --resume auto",
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
    # Last: a folder without a matching manifest is not a checkpoint.
    write_json(folder / _MANIFEST, {"format": _FORMAT, "files": files})


def drop_old_checkpoints(folder: Path, step: int, keep: int) -> None:
    """Delete all but the newest `keep` up to a step, and the remains of interrupted saves.

    Raises:
        TrainingError: they cannot be deleted.
    """
    try:
        _clear_unfinished(folder)
        _drop_old(folder, folder / f"step-{step:08d}", keep)
    except OSError as error:
        raise TrainingError(
            f"older checkpoints in {folder} cannot be deleted: {error}",
            hint="check the permissions of the folder, then use --resume auto",
        ) from error


def _clear_unfinished(folder: Path) -> None:
    for left in folder.glob(".step-*"):
        shutil.rmtree(left)


def _drop_old(folder: Path, newest: Path, keep: int) -> None:
    """Delete later steps too: the run went back to an earlier one, and may now differ."""
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
    """Restore weights, optimizer and random states from a checkpoint.

    Returns:
        The state of the loop; and whether the random states were restored, which needs the number
        of ranks that wrote the checkpoint.

    Raises:
        TrainingError: it belongs to other trained weights, or cannot be read.
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
                f"{path} holds other trained weights than this run (such as {changed[0]})",
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
            hint="--resume STEP resumes from another checkpoint",
        ) from error
    return state, is_same_world


def _state_of(values: dict[str, Any]) -> TrainState:
    state = TrainState(**values)
    best_step = 0 if state.best_step is None else state.best_step
    numbers = (state.step, state.tokens, best_step, state.not_applied)
    if not all(type(one) is int and one >= 0 for one in numbers):
        raise ValueError(f"{state} is not the state of a run")
    values_read = (state.best_value, state.first_loss, state.last_loss)
    if not all(isinstance(one, float | None) for one in values_read):
        raise ValueError(f"{state} is not the state of a run")
    return state


def _load_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Restore the saved state; keep the settings of the current recipe, which may be new."""
    settings = [{name: group[name] for name in _SETTINGS} for group in optimizer.param_groups]
    load_states(optimizer, saved)
    for group, now in zip(optimizer.param_groups, settings, strict=True):
        group.update(now)


def refuse_non_finite(model: nn.Module, step: int) -> None:
    """Raise TrainingError if a trained weight is NaN or infinite."""
    bad = [name for name, tensor in _trained(model).items() if not tensor.isfinite().all()]
    if bad:
        raise TrainingError(
            f"step {step}: {len(bad)} trained tensors are not finite (such as {bad[0]}); they "
            "were not saved, and existing checkpoints are untouched",
            hint="try a lower optimizer.learning_rate, or training.max_grad_norm=1",
        )


def find_checkpoint(folder: Path, which: str) -> Path:
    """Find the checkpoint that `--resume` names.

    Args:
        folder: the run's folder of checkpoints.
        which: "auto" for the newest intact one; a step; or a path.

    Raises:
        TrainingError: it does not exist, or is damaged.
    """
    if which == "auto":
        return newest_checkpoint(folder)
    path = folder / f"step-{int(which):08d}" if which.isdecimal() else Path(which)
    if path.resolve().parent == folder.resolve() and is_intact(path):
        return path
    state = "is damaged" if path.exists() else "does not exist"
    if path.resolve().parent != folder.resolve():
        state = f"is not a checkpoint of this run (they are in {folder})"
    steps = [str(int(p.name[5:])) for p in sorted(folder.glob("step-*")) if is_intact(p)]
    raise TrainingError(
        f"--resume: {path} {state}",
        hint=f"intact checkpoints: steps {', '.join(steps)}"
        if steps
        else "no checkpoint is intact",
    )


def newest_checkpoint(folder: Path) -> Path:
    """Find the newest intact checkpoint; warn of damaged ones and skip them.

    Raises:
        TrainingError: there is none.
    """
    for path in sorted(folder.glob("step-*"), reverse=True):
        if is_intact(path):
            return path
        log.warning("%s is damaged; skipped", path)
    raise TrainingError(
        f"--resume: no checkpoint in {folder}",
        hint="delete the run folder and start without --resume; training.save_every sets how often "
        "a checkpoint is written",
    )


def is_intact(path: Path) -> bool:
    """Return whether the files of a checkpoint are, byte for byte, those that were written."""
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
    """The sizes and digests in a checkpoint's manifest; None if it is not valid.

    Only the known file names are accepted, and no links: nothing can point outside the folder.
    """
    here = [path / name for name in (_MANIFEST, *_FILES)]
    # Nor pipes: reading one would wait forever.
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
    """Trained weights, and the persistent buffers of the modules that hold them."""
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
    """Return the state of every random generator that training uses, in this process.

    Of several GPUs it is the one of this process, so that a checkpoint can be resumed where fewer
    are visible.
    """
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else [],
    }


def set_random_states(states: dict[str, Any]) -> None:
    """Restore the states that `random_states` returned (arrays may have become tensors)."""
    random.setstate(states["python"])
    numpy_state = states["numpy"]
    inner = numpy_state["state"]
    np.random.set_state({**numpy_state, "state": {**inner, "key": np.asarray(inner["key"])}})
    torch.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(state_of_gpu(states["cuda"], torch.cuda.current_device()))


def state_of_gpu(states: list[Tensor], index: int) -> Tensor:
    """Return the state for a GPU. Older checkpoints hold those of all GPUs that were visible."""
    return states[index] if index < len(states) else states[0]


def _pack(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Build a JSON tree of `value`; put its tensors into `tensors` under their paths.

    Containers become {kind: items}, because JSON has neither tuples nor integer keys.
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
