"""Adapters as things of their own: what one is, and how two differ."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_cli._compat import quiet_libraries
from qlora_cli.adapters.files import WEIGHTS, read_adapter, refuse_slow_patterns
from qlora_cli.adapters.low_rank import Update, effective_rank, read_updates
from qlora_cli.errors import ModelError, RecipeError
from qlora_cli.runs.adapter_folder import CONFIG, AdapterFolder

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger("qlora")

_LAYER = re.compile(r"\.(\d+)\.")


def list_adapters(folder: Path) -> dict[str, Any]:
    """All adapters under a folder, those of checkpoints aside. No tensors are read.

    Returns:
        {"folder", "adapters": [{"path", "base", "type", "r", "alpha", "target_modules", "bytes",
        "steps", "best"}]}: the last two from the record of its run.

    Raises:
        RecipeError: there is no such folder.
    """
    if not folder.is_dir():
        raise RecipeError(f"{folder}: no such folder")
    found = []
    for config in sorted(folder.rglob(CONFIG)):
        inside = config.parent.relative_to(folder).parts
        if "checkpoints" in inside or any(part.startswith(".") for part in inside):
            continue
        place = AdapterFolder.find(config.parent)
        settings, record = place.config(), place.run.read_record() if place.run else {}
        weights = place.folder / WEIGHTS
        found.append(
            {
                "path": str(place.path),
                "base": place.base_path(),
                "type": str(settings.get("peft_type", "unknown")).lower(),
                "r": settings.get("r"),
                "alpha": settings.get("lora_alpha"),
                "target_modules": _names(settings.get("target_modules")),
                "bytes": weights.stat().st_size if weights.is_file() else None,
                "steps": record.get("steps"),
                "best": record.get("best"),
            }
        )
    return {"folder": str(folder), "adapters": found}


def inspect(path: Path) -> dict[str, Any]:
    """What an adapter is, and what it does to each weight.

    Returns:
        {"path", "base", "base_identity", "type", "r", "alpha", "use_rslora", "use_dora",
        "target_modules", "modules_to_save", "weights", "bytes", "norm", "modules": [M], "kinds":
        {...}, "layers": {...}}; M is {"name", "layer", "kind", "shape", "rank", "scale", "norm",
        "largest", "effective_rank"}: Frobenius and spectral norm of the scaled B A.

    Raises:
        QloraError: there is no adapter, or it is not of LoRA's kind.
    """
    quiet_libraries()
    place = AdapterFolder.find(path)
    config, saved, updates = read_lora(place)
    modules = [_describe(name, update) for name, update in updates.items()]
    return {
        "path": str(path),
        "base": place.base_path(),
        "base_identity": place.base_identity(),
        "type": config.peft_type.lower(),
        "r": config.r,
        "alpha": config.lora_alpha,
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
        "target_modules": _names(config.target_modules),
        "modules_to_save": config.modules_to_save or [],
        "weights": sum(tensor.numel() for tensor in saved.values()),
        "bytes": (place.folder / WEIGHTS).stat().st_size,
        "norm": math.hypot(*(module["norm"] for module in modules)),
        "kinds": _grouped(modules, "kind"),
        "layers": _grouped(modules, "layer"),
        "modules": modules,
    }


def diff(first: Path, second: Path) -> dict[str, Any]:
    """How two adapters differ, weight by weight.

    Returns:
        {"first", "second", "settings": {name: [first, second]}, "cosine", "norm_ratio",
        "distance", "modules": [{"name", "cosine", "norm_ratio", "distance"}], "only_first",
        "only_second"}: `norm_ratio` is the second norm over the first, `distance` the norm of the
        difference over the first norm; null where the first is zero.

    Raises:
        QloraError: one of them is no adapter of LoRA's kind, or they fit no common base.
    """
    quiet_libraries()
    places = AdapterFolder.find(first), AdapterFolder.find(second)
    (config, _, mine), (other_config, _, other) = map(read_lora, places)
    check_same_base(places)
    check_same_shapes(places, [mine, other])
    shared = [name for name in mine if name in other]
    rows = [_compare(name, mine[name], other[name]) for name in shared]
    dots = math.fsum(mine[name].dot(other[name]) for name in shared)
    norms = [math.hypot(*(update.norm() for update in one.values())) for one in (mine, other)]
    apart = [
        update.norm() for one in (mine, other) for name, update in one.items() if name not in shared
    ]
    distance = math.hypot(*(mine[name].distance(other[name]) for name in shared), *apart)
    return {
        "first": str(first),
        "second": str(second),
        "settings": _changed(config.to_dict(), other_config.to_dict()),
        "cosine": ratio(dots, norms[0] * norms[1]),
        "norm_ratio": ratio(norms[1], norms[0]),
        "distance": ratio(distance, norms[0]),
        "modules": rows,
        "only_first": [name for name in mine if name not in other],
        "only_second": [name for name in other if name not in mine],
    }


def read_lora(place: AdapterFolder) -> tuple[Any, dict[str, Tensor], dict[str, Update]]:
    """The settings, tensors and updates of an adapter.

    Raises:
        ModelError: it is not of LoRA's kind, or not finite.
    """
    config, saved = read_adapter(place.folder)
    if config.peft_type != "LORA":
        raise ModelError(f"{place.path}: a {config.peft_type} adapter, and only LoRA's are read")
    refuse_slow_patterns(config, [name.removesuffix(".weight") for name in saved], place.folder)
    if config.target_parameters:
        raise ModelError(
            f"{place.path}: target_parameters ({', '.join(sorted(config.target_parameters))}): "
            "updates of experts in one tensor are not read",
            hint="qlora eval and qlora merge take it",
        )
    updates = read_updates(config, saved)
    if not updates:
        raise ModelError(f"{place.path}: no pair of factors among its {len(saved)} tensors")
    if any(not bool(tensor.isfinite().all()) for tensor in saved.values()):
        raise ModelError(f"{place.path}: values that are not finite")
    return config, saved, updates


def _names(modules: Any) -> list[str] | str | None:
    if isinstance(modules, list | set | tuple):
        return sorted(map(str, modules))
    # Settings that were not written by PEFT may hold anything.
    return None if modules is None else str(modules)


def _describe(name: str, update: Update) -> dict[str, Any]:
    values = update.singular_values()
    layer = _LAYER.search(name)
    return {
        "name": name,
        "layer": int(layer[1]) if layer else None,
        "kind": name.rpartition(".")[2],
        "shape": [update.b.shape[0], update.a.shape[1]],
        "rank": update.rank,
        "norm": float(values.norm()),
        "largest": float(values[0]),
        "effective_rank": effective_rank(values),
    }


def _grouped(modules: Sequence[dict[str, Any]], key: str) -> dict[str, dict[str, Any]]:
    """Norm of all updates of a kind (or layer) together, and the mean of their effective ranks."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for module in sorted(modules, key=lambda module: module["layer"] or 0):
        if module[key] is not None:
            groups.setdefault(str(module[key]), []).append(module)
    return {
        name: {
            "modules": len(some),
            "norm": math.hypot(*(module["norm"] for module in some)),
            "largest": max(module["largest"] for module in some),
            "effective_rank": math.fsum(module["effective_rank"] for module in some) / len(some),
        }
        for name, some in groups.items()
    }


def _compare(name: str, one: Update, other: Update) -> dict[str, Any]:
    norms = one.norm(), other.norm()
    return {
        "name": name,
        "cosine": ratio(one.dot(other), norms[0] * norms[1]),
        "norm_ratio": ratio(norms[1], norms[0]),
        "distance": ratio(one.distance(other), norms[0]),
    }


def ratio(value: float, by: float) -> float | None:
    """A quotient; None where there is none."""
    return value / by if by else None


def _changed(one: dict[str, Any], other: dict[str, Any]) -> dict[str, list[Any]]:
    """Settings that are not the same, as JSON has them."""

    def plain(value: Any) -> Any:
        return sorted(value) if isinstance(value, set) else value

    pairs = {name: [plain(one[name]), plain(other[name])] for name in one if name in other}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def check_same_base(places: Sequence[AdapterFolder]) -> None:
    """Raises ModelError if it is known that the adapters were trained on different weights."""
    known = [(place, one) for place in places if (one := place.base_identity()) is not None]
    for place, one in known[1:]:
        first, base = known[0]
        if one != base:
            raise ModelError(
                f"{first.path} was trained on {first.base_path()}, and {place.path} on "
                f"{place.base_path()}, which has other weights",
                hint="the difference or sum of two adapters has a meaning on one base alone",
            )
    if len({place.base_path() for place in places}) > 1 and len(known) < len(places):
        names = ", ".join(f"{place.path}: {place.base_path() or 'nothing'}" for place in places)
        log.warning("the adapters name different bases (%s); are they the same weights?", names)


def check_same_shapes(
    places: Sequence[AdapterFolder], updates: Sequence[dict[str, Update]]
) -> None:
    """Raises ModelError if the adapters change weights of one name and different shapes."""
    shapes: dict[str, tuple[AdapterFolder, tuple[int, int]]] = {}
    for place, one in zip(places, updates, strict=True):
        for name, update in one.items():
            shape = update.b.shape[0], update.a.shape[1]
            first, known = shapes.setdefault(name, (place, shape))
            if known != shape:
                raise ModelError(
                    f"{name} is {known[0]} x {known[1]} for {first.path} and {shape[0]} x "
                    f"{shape[1]} for {place.path}: they belong to different base models"
                )
