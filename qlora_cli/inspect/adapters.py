"""List adapters, inspect one, and compare two weight by weight."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_cli._compat import quiet_libraries
from qlora_cli.adapters.files import WEIGHTS, read_adapter, refuse_slow_patterns
from qlora_cli.adapters.low_rank import Update, effective_rank, read_updates
from qlora_cli.common.report import Report
from qlora_cli.errors import ModelError, RecipeError
from qlora_cli.runs.adapter_folder import CONFIG, AdapterFolder

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger("qlora")

_LAYER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class ListedAdapter(Report):
    """An adapter that was found in a folder."""

    path: str
    """Folder of the run or adapter."""
    base: str
    """The base model that its settings name."""
    type: str
    """PEFT type, in lower case."""
    r: int | None
    """Rank."""
    alpha: float | None
    """Scale of the update, times r (or its square root)."""
    target_modules: list[str] | str | None
    """Modules with an update."""
    bytes: int | None
    """Size of the weights; null if the file is missing."""
    steps: int | None
    """Steps of its run; null if it does not belong to a run."""
    best: dict[str, Any] | None
    """Best evaluation of its run (`by`, `value`, `step`)."""


@dataclass(frozen=True, slots=True)
class AdapterList(Report):
    """The adapters in a folder and below."""

    folder: str
    """The folder that was searched."""
    adapters: list[ListedAdapter]
    """Adapters, except those in checkpoints."""


@dataclass(frozen=True, slots=True)
class ModuleUpdate(Report):
    """The update (scale B A) of one module."""

    name: str
    """Name of the module."""
    layer: int | None
    """Index of its layer; null outside of the layers."""
    kind: str
    """Last part of the name, such as `q_proj`."""
    shape: list[int]
    """Outputs and inputs of the module."""
    rank: int
    """Rank of the factors."""
    norm: float
    """Frobenius norm."""
    largest: float
    """Spectral norm: the largest singular value."""
    effective_rank: float
    """Effective rank: the exponential of the entropy of the singular values."""


@dataclass(frozen=True, slots=True)
class UpdateGroup(Report):
    """The updates of all modules of one kind or layer."""

    modules: int
    """Number of modules."""
    norm: float
    """Frobenius norm of all updates together."""
    largest: float
    """Largest singular value among them."""
    effective_rank: float
    """Mean of their effective ranks."""


@dataclass(frozen=True, slots=True)
class AdapterReport(Report):
    """The settings of an adapter, and how much it changes each weight."""

    path: str
    """The run or adapter folder."""
    base: str
    """The base model that its settings name."""
    base_identity: dict[str, str] | None
    """Digests of the base model that it was trained on; null if it does not belong to a run."""
    type: str
    """PEFT type, in lower case."""
    r: int
    """Rank."""
    alpha: float
    """Scale of the update, times r (or its square root)."""
    use_rslora: bool
    """The scale is alpha / sqrt(r) instead of alpha / r."""
    use_dora: bool
    """The adapter has DoRA magnitudes, which the norms below leave out."""
    target_modules: list[str] | str | None
    """Modules with an update."""
    modules_to_save: list[str]
    """Modules that were trained in full."""
    weights: int
    """Number of weights in the adapter."""
    bytes: int
    """Size of the adapter's file."""
    norm: float
    """Frobenius norm of all updates together."""
    kinds: dict[str, UpdateGroup]
    """Kind of module -> its updates."""
    layers: dict[str, UpdateGroup]
    """Layer -> its updates."""
    modules: list[ModuleUpdate]
    """Every module."""


@dataclass(frozen=True, slots=True)
class ModuleDifference(Report):
    """The difference of two updates of one module."""

    name: str
    """Name of the module."""
    cosine: float | None
    """Cosine of the two updates; null if one is zero."""
    norm_ratio: float | None
    """Second norm divided by the first; null if the first is zero."""
    distance: float | None
    """Norm of the difference divided by the first norm; null if the first is zero."""


@dataclass(frozen=True, slots=True)
class AdapterDifference(Report):
    """The differences of two adapters of one base."""

    first: str
    """The first run or adapter."""
    second: str
    """The second run or adapter."""
    settings: dict[str, list[Any]]
    """Settings that differ -> the value of the first and of the second."""
    cosine: float | None
    """Cosine of all updates together; null if one adapter is zero."""
    norm_ratio: float | None
    """Second norm divided by the first, over all updates; null if the first is zero."""
    distance: float | None
    """Norm of the difference divided by the first norm, over all updates; null if that is zero."""
    modules: list[ModuleDifference]
    """Modules that both adapters update."""
    only_first: list[str]
    """Modules that only the first adapter updates."""
    only_second: list[str]
    """Modules that only the second adapter updates."""


def list_adapters(folder: Path) -> AdapterList:
    """List all adapters below a folder, except those in checkpoints. No tensors are read.

    Raises:
        RecipeError: the folder does not exist.
    """
    if not folder.is_dir():
        raise RecipeError(f"{folder}: no such folder")
    found = []
    for config in sorted(folder.rglob(CONFIG)):
        inside = config.parent.relative_to(folder).parts
        if "checkpoints" in inside or any(part.startswith(".") for part in inside):
            continue
        adapter = AdapterFolder.find_unread(config.parent)
        settings, record = adapter.config(), adapter.run.read_record() if adapter.run else {}
        weights = adapter.folder / WEIGHTS
        found.append(
            ListedAdapter(
                path=str(adapter.path),
                base=adapter.base_path(),
                type=str(settings.get("peft_type", "unknown")).lower(),
                r=settings.get("r"),
                alpha=settings.get("lora_alpha"),
                target_modules=_names(settings.get("target_modules")),
                bytes=weights.stat().st_size if weights.is_file() else None,
                steps=record.get("steps"),
                best=record.get("best"),
            )
        )
    return AdapterList(str(folder), found)


def inspect(path: Path) -> AdapterReport:
    """Describe an adapter, and its update of each weight.

    Raises:
        QloraError: there is no adapter, or it is not a LoRA adapter.
    """
    quiet_libraries()
    adapter = AdapterFolder.find(path)
    config, saved, updates = read_lora(adapter)
    modules = [_describe(name, update) for name, update in updates.items()]
    return AdapterReport(
        path=str(path),
        base=adapter.base_path(),
        base_identity=adapter.base_identity(),
        type=config.peft_type.lower(),
        r=config.r,
        alpha=config.lora_alpha,
        use_rslora=bool(config.use_rslora),
        use_dora=bool(config.use_dora),
        target_modules=_names(config.target_modules),
        modules_to_save=config.modules_to_save or [],
        weights=sum(tensor.numel() for tensor in saved.values()),
        bytes=(adapter.folder / WEIGHTS).stat().st_size,
        norm=math.hypot(*(module.norm for module in modules)),
        kinds=_grouped(modules, [module.kind for module in modules]),
        layers=_grouped(modules, [module.layer for module in modules]),
        modules=modules,
    )


def diff(first: Path, second: Path) -> AdapterDifference:
    """Compare two adapters weight by weight.

    Raises:
        QloraError: one of them is not a LoRA adapter, or they do not fit the same base.
    """
    quiet_libraries()
    adapters = AdapterFolder.find(first), AdapterFolder.find(second)
    (config, _, mine), (other_config, _, other) = map(read_lora, adapters)
    check_same_base(adapters)
    check_same_shapes(adapters, [mine, other])
    shared = [name for name in mine if name in other]
    dots = math.fsum(mine[name].dot(other[name]) for name in shared)
    norms = [math.hypot(*(update.norm() for update in one.values())) for one in (mine, other)]
    unshared = [
        update.norm() for one in (mine, other) for name, update in one.items() if name not in shared
    ]
    distance = math.hypot(*(mine[name].distance(other[name]) for name in shared), *unshared)
    return AdapterDifference(
        first=str(first),
        second=str(second),
        settings=_changed(config.to_dict(), other_config.to_dict()),
        cosine=ratio(dots, norms[0] * norms[1]),
        norm_ratio=ratio(norms[1], norms[0]),
        distance=ratio(distance, norms[0]),
        modules=[_compare(name, mine[name], other[name]) for name in shared],
        only_first=[name for name in mine if name not in other],
        only_second=[name for name in other if name not in mine],
    )


def read_lora(adapter: AdapterFolder) -> tuple[Any, dict[str, Tensor], dict[str, Update]]:
    """Read the settings, tensors and updates of a LoRA adapter.

    Raises:
        ModelError: it is not a LoRA adapter, or has values that are not finite.
    """
    config, saved = read_adapter(adapter.folder)
    if config.peft_type != "LORA":
        raise ModelError(
            f"{adapter.path}: found a {config.peft_type} adapter; only LoRA adapters can be read"
        )
    names = [name.removesuffix(".weight") for name in saved]
    refuse_slow_patterns(config, names, adapter.folder)
    if config.target_parameters:
        raise ModelError(
            f"{adapter.path}: target_parameters ({', '.join(sorted(config.target_parameters))}): "
            "updates of several experts in one tensor cannot be read",
            hint="qlora eval and qlora merge accept this adapter",
        )
    updates = read_updates(config, saved)
    if not updates:
        raise ModelError(f"{adapter.path}: no pair of factors among its {len(saved)} tensors")
    if any(not bool(tensor.isfinite().all()) for tensor in saved.values()):
        raise ModelError(f"{adapter.path}: some values are not finite")
    return config, saved, updates


def _names(modules: Any) -> list[str] | str | None:
    if isinstance(modules, list | set | tuple):
        return sorted(map(str, modules))
    # Settings that PEFT did not write may hold anything.
    return None if modules is None else str(modules)


def _describe(name: str, update: Update) -> ModuleUpdate:
    values = update.singular_values()
    layer = _LAYER.search(name)
    return ModuleUpdate(
        name=name,
        layer=int(layer[1]) if layer else None,
        kind=name.rpartition(".")[2],
        shape=[update.b.shape[0], update.a.shape[1]],
        rank=update.rank,
        norm=float(values.norm()),
        largest=float(values[0]),
        effective_rank=effective_rank(values),
    )


def _grouped(
    modules: Sequence[ModuleUpdate], keys: Sequence[str | int | None]
) -> dict[str, UpdateGroup]:
    """Summarize the modules with the same key. Modules whose key is None are left out."""
    groups: dict[str, list[ModuleUpdate]] = {}
    pairs = zip(modules, keys, strict=True)
    for module, key in sorted(pairs, key=lambda pair: pair[0].layer or 0):
        if key is not None:
            groups.setdefault(str(key), []).append(module)
    return {
        name: UpdateGroup(
            modules=len(some),
            norm=math.hypot(*(module.norm for module in some)),
            largest=max(module.largest for module in some),
            effective_rank=math.fsum(module.effective_rank for module in some) / len(some),
        )
        for name, some in groups.items()
    }


def _compare(name: str, one: Update, other: Update) -> ModuleDifference:
    norms = one.norm(), other.norm()
    return ModuleDifference(
        name=name,
        cosine=ratio(one.dot(other), norms[0] * norms[1]),
        norm_ratio=ratio(norms[1], norms[0]),
        distance=ratio(one.distance(other), norms[0]),
    )


def ratio(value: float, by: float) -> float | None:
    """Divide, or return None if the divisor is zero."""
    return value / by if by else None


def _changed(one: dict[str, Any], other: dict[str, Any]) -> dict[str, list[Any]]:
    """Return the settings that differ, as JSON values."""

    def plain(value: Any) -> Any:
        return sorted(value) if isinstance(value, set) else value

    pairs = {name: [plain(one[name]), plain(other[name])] for name in one if name in other}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def check_same_base(adapters: Sequence[AdapterFolder]) -> None:
    """Raise ModelError if the adapters are known to be trained on different weights."""
    known = [(one, base) for one in adapters if (base := one.base_identity()) is not None]
    for adapter, base in known[1:]:
        first, first_base = known[0]
        if base != first_base:
            raise ModelError(
                f"{first.path} was trained on {first.base_path()}, and {adapter.path} on "
                f"{adapter.base_path()}, which has other weights",
                hint="only adapters of the same base can be compared or combined",
            )
    if len({one.base_path() for one in adapters}) > 1 and len(known) < len(adapters):
        names = ", ".join(f"{one.path}: {one.base_path() or 'nothing'}" for one in adapters)
        log.warning("the adapters name different bases (%s); are they the same weights?", names)


def check_same_shapes(
    adapters: Sequence[AdapterFolder], updates: Sequence[dict[str, Update]]
) -> None:
    """Raise ModelError if the adapters update a weight of the same name in different shapes."""
    shapes: dict[str, tuple[AdapterFolder, tuple[int, int]]] = {}
    for adapter, one in zip(adapters, updates, strict=True):
        for name, update in one.items():
            shape = update.b.shape[0], update.a.shape[1]
            first, known = shapes.setdefault(name, (adapter, shape))
            if known != shape:
                raise ModelError(
                    f"{name} is {known[0]} x {known[1]} for {first.path} and {shape[0]} x "
                    f"{shape[1]} for {adapter.path}: they belong to different base models"
                )
