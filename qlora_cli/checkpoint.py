"""Checkpoints: all that is needed to go on as if nothing had happened. Nothing is pickled."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qlora_cli.errors import TrainingError
from qlora_cli.types import TrainState

log = logging.getLogger("qlora")

_MANIFEST = "manifest.json"


def save_checkpoint(
    folder: Path,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    state: TrainState,
    keep: int,
) -> Path:
    """Write `folder/step-N`, whole or not at all, then drop all but the newest `keep`.

    The trained weights, the optimizer, the random generators, the state of the loop. The position
    in the data is a function of the step, and so is the learning rate.

    Raises:
        TrainingError: a trained weight is not finite; nothing was written.
    """
    refuse_non_finite(model, state.step)
    path = folder / f"step-{state.step:08d}"
    unfinished = folder / f".{path.name}.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    save_file(_trained(model), unfinished / "trained.safetensors")
    tensors: dict[str, Tensor] = {}
    tree = _pack(
        {
            "state": dataclasses.asdict(state),
            "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(),
            "random": _random_states(),
        },
        "",
        tensors,
    )
    save_file(tensors, unfinished / "state.safetensors")
    _write_json(unfinished / "state.json", tree)
    # Written last: a folder without a manifest that agrees with it is no checkpoint.
    _write_json(unfinished / _MANIFEST, _digests(unfinished))
    shutil.rmtree(path, ignore_errors=True)
    unfinished.rename(path)
    for old in sorted(folder.glob("step-*"))[:-keep]:
        shutil.rmtree(old)
    return path


def load_checkpoint(
    path: Path,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
) -> TrainState:
    """Put a checkpoint's weights, optimizer and random states in place.

    Raises:
        TrainingError: it was written for another set of trained weights.
    """
    saved = load_file(path / "trained.safetensors")
    live = _trained(model)
    if {k: v.shape for k, v in saved.items()} != {k: v.shape for k, v in live.items()}:
        changed = sorted(set(saved) ^ set(live)) or sorted(saved)
        raise TrainingError(
            f"{path} was written for other trained weights (such as {changed[0]})",
            hint="resume with the recipe of the run: qlora train RUN/recipe.yaml --resume",
        )
    with torch.no_grad():
        for name, tensor in live.items():
            tensor.copy_(saved[name])
    tree = json.loads((path / "state.json").read_text(encoding="utf-8"))
    values = _unpack(tree, load_file(path / "state.safetensors"))
    optimizer.load_state_dict(values["optimizer"])
    scaler.load_state_dict(values["scaler"])
    _set_random_states(values["random"])
    return TrainState(**values["state"])


def refuse_non_finite(model: nn.Module, step: int) -> None:
    """Raises TrainingError if a trained weight is NaN or infinite."""
    bad = [name for name, tensor in _trained(model).items() if not tensor.isfinite().all()]
    if bad:
        raise TrainingError(
            f"step {step}: {len(bad)} trained tensors are not finite (such as {bad[0]}); they "
            "were not saved, and what was saved before is untouched",
            hint="try a lower optimizer.learning_rate, or training.max_grad_norm=1",
        )


def newest_checkpoint(folder: Path) -> Path:
    """The newest checkpoint that is whole. Damaged ones are named and passed over.

    Raises:
        TrainingError: there is none.
    """
    for path in sorted(folder.glob("step-*"), reverse=True):
        if _is_whole(path):
            return path
        log.warning("%s is damaged; passed over", path)
    raise TrainingError(
        f"--resume: no checkpoint in {folder}",
        hint="nothing was saved: remove the run's folder and start without --resume; "
        "training.save_every sets how often a checkpoint is written",
    )


def _is_whole(path: Path) -> bool:
    try:
        manifest = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(manifest == _digests(path))


def _digests(folder: Path) -> dict[str, str]:
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.iterdir())
        if file.name != _MANIFEST
    }


def _write_json(path: Path, value: object) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())


def _trained(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: parameter.detach()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def _random_states() -> dict[str, Any]:
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _set_random_states(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    numpy_state = states["numpy"]
    numpy_state["state"]["key"] = numpy_state["state"]["key"].numpy()
    np.random.set_state(numpy_state)
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
