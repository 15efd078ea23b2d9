"""Adapters as things of their own: what one is, how two differ, and several made into one."""

from __future__ import annotations

import logging
import math
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_cli._compat import quiet_libraries
from qlora_cli.adapter_place import CONFIG, AdapterPlace
from qlora_cli.adapter_text import combine_card
from qlora_cli.bootstrap import CONFIDENCE, RESAMPLES
from qlora_cli.errors import ModelError, RecipeError
from qlora_cli.evaluate import Answers, Subject, choose_tasks, examine, summarize
from qlora_cli.model.adapter_set import WEIGHTS, read_adapter
from qlora_cli.model.combine import METHODS, combine_adapters, save_adapter
from qlora_cli.model.factors import Update, effective_rank, read_updates, stacked
from qlora_cli.recipe import Recipe
from qlora_cli.recipe_file import dump_recipe, load_recipe
from qlora_cli.run_folder import RunFolder, environment, readable_as_the_folder
from qlora_cli.world import World

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger("qlora")

_OF_A_RUN = ("README.md", "run.json", "recipe.yaml")
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
        place = AdapterPlace.find(config.parent)
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
    place = AdapterPlace.find(path)
    config, saved, updates = _read(place)
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
    places = AdapterPlace.find(first), AdapterPlace.find(second)
    (config, _, mine), (other_config, _, other) = map(_read, places)
    _refuse_two_bases(places)
    _refuse_two_shapes(places, [mine, other])
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
        "cosine": _over(dots, norms[0] * norms[1]),
        "norm_ratio": _over(norms[1], norms[0]),
        "distance": _over(distance, norms[0]),
        "modules": rows,
        "only_first": [name for name in mine if name not in other],
        "only_second": [name for name in other if name not in mine],
    }


def combine(
    paths: Sequence[Path],
    output: Path,
    overrides: Sequence[str] = (),
    *,
    method: str,
    weights: Sequence[float] | None = None,
    density: float = 0.5,
    rank: int | None = None,
    seed: int = 0,
    measure: bool = True,
) -> dict[str, Any]:
    """Make one adapter of several, and write it as a folder that the other commands take.

    Args:
        overrides: of the recipe that is written with it: the first run's.
        method: one of PEFT's, such as "linear", "cat", "svd", "ties" or "dare_linear".
        weights: of each adapter; None gives each the same, 1 in all.
        density: share of values that are kept, for the methods that drop some.
        rank: of the outcome, for the methods that end in a singular value decomposition.
        measure: evaluate the outcome beside its parents, if the recipe says how.

    Returns:
        {"output", "adapters", "weights", "method", "density", "rank", "seed", "norm", "error",
        "evaluations"}: `error` is the distance from the weighted sum of what the adapters add, over
        that sum's norm; `evaluations` has for each parent what `evaluate` returns, with the outcome
        as the second model.

    Raises:
        RecipeError: the numbers do not fit together, or `output` exists.
        ModelError: the adapters cannot be combined.
    """
    quiet_libraries()
    if output.exists():
        raise RecipeError(f"--output: {output} exists", hint="choose another folder, or remove it")
    shares = _weights(paths, weights)
    if method not in METHODS:
        raise RecipeError(f"--method: {method}; there is {', '.join(METHODS)}")
    if METHODS[method] and density == 0:
        raise RecipeError(f"--density: 0 leaves nothing over; {method} needs more than 0, up to 1")
    places = [AdapterPlace.find(path) for path in paths]
    _refuse_two_bases(places)
    read = [_read(place) for place in places]
    _refuse_two_shapes(places, [updates for _, _, updates in read])
    config, saved = combine_adapters(
        [(config, saved) for config, saved, _ in read],
        shares,
        method=method,
        density=density,
        rank=rank,
        seed=seed,
    )
    made = read_updates(config, saved)
    report = {
        "output": str(output),
        "adapters": [str(path) for path in paths],
        "weights": shares,
        "method": method,
        "density": density if METHODS[method] else None,
        "rank": config.r,
        "seed": seed,
        "norm": math.hypot(*(update.norm() for update in made.values())),
        "error": _error(made, [updates for _, _, updates in read], shares),
    }
    recipe = _recipe_of(places, overrides)
    _write(output, places, lambda folder: save_adapter(config, saved, folder), report, recipe)
    evaluations = _evaluate(output, recipe, places) if measure and recipe else []
    if evaluations:
        RunFolder(output).update_record(evaluations=evaluations)
    return {**report, "evaluations": evaluations}


def read_weights(text: str | None) -> list[float] | None:
    """The numbers of `--weights`.

    Raises:
        RecipeError: they are none.
    """
    if text is None:
        return None
    try:
        weights = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise RecipeError(
            f"--weights {text}: needs numbers with commas between them", hint="--weights 0.7,0.3"
        ) from error
    if not all(map(math.isfinite, weights)):
        raise RecipeError(f"--weights {text}: needs finite numbers")
    return weights


def _read(place: AdapterPlace) -> tuple[Any, dict[str, Tensor], dict[str, Update]]:
    config, saved = read_adapter(place.folder)
    if config.peft_type != "LORA":
        raise ModelError(f"{place.path}: a {config.peft_type} adapter, and only LoRA's are read")
    updates = read_updates(config, saved)
    if not updates:
        raise ModelError(f"{place.path}: no pair of factors among its {len(saved)} tensors")
    if any(not bool(tensor.isfinite().all()) for tensor in saved.values()):
        raise ModelError(f"{place.path}: values that are not finite")
    return config, saved, updates


def _names(modules: Any) -> list[str] | str | None:
    return modules if modules is None or isinstance(modules, str) else sorted(modules)


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
        "cosine": _over(one.dot(other), norms[0] * norms[1]),
        "norm_ratio": _over(norms[1], norms[0]),
        "distance": _over(one.distance(other), norms[0]),
    }


def _over(value: float, by: float) -> float | None:
    return value / by if by else None


def _changed(one: dict[str, Any], other: dict[str, Any]) -> dict[str, list[Any]]:
    """Settings that are not the same, as JSON has them."""

    def plain(value: Any) -> Any:
        return sorted(value) if isinstance(value, set) else value

    pairs = {name: [plain(one[name]), plain(other[name])] for name in one if name in other}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _refuse_two_bases(places: Sequence[AdapterPlace]) -> None:
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


def _refuse_two_shapes(
    places: Sequence[AdapterPlace], updates: Sequence[dict[str, Update]]
) -> None:
    shapes: dict[str, tuple[AdapterPlace, tuple[int, int]]] = {}
    for place, one in zip(places, updates, strict=True):
        for name, update in one.items():
            shape = update.b.shape[0], update.a.shape[1]
            first, known = shapes.setdefault(name, (place, shape))
            if known != shape:
                raise ModelError(
                    f"{name} is {known[0]} x {known[1]} for {first.path} and {shape[0]} x "
                    f"{shape[1]} for {place.path}: they belong to different base models"
                )


def _weights(paths: Sequence[Path], weights: Sequence[float] | None) -> list[float]:
    if len(paths) < 2:
        raise RecipeError("name two adapters or more", hint="qlora adapters combine A B --output C")
    if weights is None:
        return [1 / len(paths)] * len(paths)
    if len(weights) != len(paths):
        raise RecipeError(
            f"--weights: {len(weights)} numbers for {len(paths)} adapters; give one for each"
        )
    return list(weights)


def _error(
    made: dict[str, Update], parents: Sequence[dict[str, Update]], weights: Sequence[float]
) -> float | None:
    """How far the outcome is from the weighted sum of the updates."""
    names = {name for updates in parents for name in updates}
    wanted = {}
    for name in names:
        some = [(one[name], w) for one, w in zip(parents, weights, strict=True) if name in one]
        wanted[name] = stacked([update for update, _ in some], [weight for _, weight in some])
    norm = math.hypot(*(update.norm() for update in wanted.values()))
    return _over(math.hypot(*(wanted[name].distance(made[name]) for name in names)), norm)


def _recipe_of(places: Sequence[AdapterPlace], overrides: Sequence[str]) -> Recipe | None:
    """The recipe of the first run among the parents."""
    runs = [place.run for place in places if place.run is not None]
    if not runs and overrides:
        raise RecipeError("--set: none of the adapters is a run, so there is no recipe to change")
    return load_recipe(runs[0].recipe, overrides).recipe if runs else None


def _write(
    output: Path,
    places: Sequence[AdapterPlace],
    save: Callable[[Path], None],
    report: dict[str, Any],
    recipe: Recipe | None,
) -> None:
    """The adapter with the tokenizer of the first; and a recipe, if there is one."""
    unfinished = output.with_name(f".{output.name}.unfinished")
    first = next((place for place in places if place.run is not None), places[0])
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        save(unfinished)
        for file in sorted(first.folder.iterdir()):
            if file.name not in (CONFIG, WEIGHTS, *_OF_A_RUN) and file.is_file():
                shutil.copy2(file, unfinished)
        (unfinished / "README.md").write_text(combine_card(output.name, report), encoding="utf-8")
        if recipe is not None:
            # What `qlora eval` and `qlora merge` need to know.
            adapter = {"r": report["rank"], "alpha": report["rank"], "rank_pattern": {}}
            adapter |= {"alpha_pattern": {}, "use_rslora": False}
            made = {"adapter": recipe.adapter.model_copy(update=adapter)}
            run = RunFolder(unfinished)
            run.recipe.write_text(dump_recipe(recipe.model_copy(update=made)), encoding="utf-8")
            run.update_record(
                status="combined", base=first.base_identity(), combined=report, **environment()
            )
        readable_as_the_folder(unfinished)
        unfinished.rename(output)
    except OSError as error:
        raise RecipeError(f"--output: {output}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _evaluate(output: Path, recipe: Recipe, places: Sequence[AdapterPlace]) -> list[dict[str, Any]]:
    """The outcome beside each parent, all of them on what the recipe asks."""
    if not recipe.data.evaluation_sources and not recipe.evaluation.tasks:
        return []
    tasks, world = choose_tasks(recipe, None, is_tuned=True), World()
    paths = [*(place.path for place in places), output]
    names = [path.resolve().name for path in paths]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    folders = [*(place.folder for place in places), output]
    answers: dict[str, Answers] = {}
    for name, folder in zip(names, folders, strict=True):
        subject = Subject(name, recipe, folder)
        answers |= examine(subject, recipe, tasks, world, alone=True)
    *parents, made = names
    return [
        {
            "target": str(output),
            **summarize(tasks, {parent: answers[parent], made: answers[made]}),
            "confidence": CONFIDENCE,
            "resamples": RESAMPLES,
        }
        for parent in parents
    ]
