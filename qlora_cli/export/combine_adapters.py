"""Combine several adapters into one, and evaluate it against its parents."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from qlora_cli._compat import quiet_libraries
from qlora_cli.adapters.combine import METHODS, combine_adapters, write_adapter
from qlora_cli.adapters.files import WEIGHTS
from qlora_cli.adapters.low_rank import Update, read_updates, weighted_sum
from qlora_cli.common.atomic_files import atomic_folder
from qlora_cli.common.digests import write_digests
from qlora_cli.common.formatting import did_you_mean
from qlora_cli.distributed.world import World
from qlora_cli.errors import RecipeError
from qlora_cli.evaluate.bootstrap import CONFIDENCE, RESAMPLES
from qlora_cli.evaluate.evaluate import choose_tasks, evaluate_model
from qlora_cli.evaluate.report import summarize
from qlora_cli.evaluate.target import EvaluatedModel
from qlora_cli.export.combine_report import CombineReport, ParentEvaluation, combine_card
from qlora_cli.inspect.adapters import check_same_base, check_same_shapes, ratio, read_lora
from qlora_cli.recipe.load import dump_recipe
from qlora_cli.recipe.schema import Recipe
from qlora_cli.runs.adapter_folder import CONFIG, AdapterFolder
from qlora_cli.runs.run_folder import RunFolder, environment, recipe_of_run
from qlora_cli.tasks.task import TaskOutcomes

_OF_A_RUN = ("README.md", "run.json", "recipe.yaml")


@dataclass(frozen=True)
class CombineOptions:
    """How adapters are combined."""

    method: str
    """One of PEFT's, such as "linear", "cat", "svd", "ties" or "dare_linear"."""
    density: float = 0.5
    """Share of values to keep, for the methods that drop some."""
    rank: int | None = None
    """Rank of the result, for the methods that end in a singular value decomposition."""
    seed: int = 0
    """Seed of random dropping."""


def combine(
    paths: Sequence[Path],
    output: Path,
    options: CombineOptions,
    overrides: Sequence[str] = (),
    *,
    weights: Sequence[float] | None = None,
    measure: bool = True,
) -> CombineReport:
    """Combine several adapters into one, and write it as a folder that other commands accept.

    Args:
        overrides: changes to the recipe of the first run, which is written with the result.
        weights: one per adapter; None gives each the same weight, with a sum of 1.
        measure: evaluate the result and its parents, if the recipe says how.

    Raises:
        RecipeError: the options contradict each other, or `output` exists.
        ModelError: the adapters cannot be combined.
    """
    quiet_libraries()
    if output.exists():
        raise RecipeError(f"--output: {output} exists", hint="choose another folder, or remove it")
    shares = _weights(paths, weights)
    method, density = options.method, options.density
    if method not in METHODS:
        raise RecipeError(
            f"--method: unknown method {method}{did_you_mean(method, METHODS)}; choose from "
            f"{', '.join(METHODS)}"
        )
    if METHODS[method] and density == 0:
        raise RecipeError(f"--density: 0 drops every value; {method} needs more than 0, up to 1")
    places = [AdapterFolder.find(path) for path in paths]
    check_same_base(places)
    read = [read_lora(place) for place in places]
    check_same_shapes(places, [updates for _, _, updates in read])
    config, saved = combine_adapters(
        [(config, saved) for config, saved, _ in read], shares, **asdict(options)
    )
    made = read_updates(config, saved)
    report = CombineReport(
        output=str(output),
        adapters=[str(path) for path in paths],
        weights=shares,
        method=method,
        density=density if METHODS[method] else None,
        rank=config.r,
        seed=options.seed,
        norm=math.hypot(*(update.norm() for update in made.values())),
        error=_error(made, [updates for _, _, updates in read], shares),
        evaluations=(),
    )
    recipe = _recipe_of(places, overrides)
    _write(output, places, lambda folder: write_adapter(config, saved, folder), report, recipe)
    evaluations = _evaluate(output, recipe, places) if measure and recipe else []
    if evaluations:
        RunFolder(output).update_record(evaluations=[one.to_json() for one in evaluations])
    return replace(report, evaluations=evaluations)


def read_weights(text: str | None) -> list[float] | None:
    """Parse the numbers of `--weights`.

    Raises:
        RecipeError: they are not finite numbers.
    """
    if text is None:
        return None
    try:
        weights = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise RecipeError(
            f"--weights {text}: takes numbers separated by commas", hint="--weights 0.7,0.3"
        ) from error
    if not all(map(math.isfinite, weights)):
        raise RecipeError(f"--weights {text}: takes finite numbers only")
    return weights


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
    """Return the distance from the weighted sum of the updates, relative to its norm."""
    names = {name for updates in parents for name in updates}
    wanted = {}
    for name in names:
        some = [(one[name], w) for one, w in zip(parents, weights, strict=True) if name in one]
        wanted[name] = weighted_sum([update for update, _ in some], [weight for _, weight in some])
    norm = math.hypot(*(update.norm() for update in wanted.values()))
    return ratio(math.hypot(*(wanted[name].distance(made[name]) for name in names)), norm)


def _recipe_of(places: Sequence[AdapterFolder], overrides: Sequence[str]) -> Recipe | None:
    """Return the recipe of the first run among the parents."""
    runs = [place.run for place in places if place.run is not None]
    if not runs and overrides:
        raise RecipeError("--set: none of the adapters is a run, so there is no recipe to change")
    return recipe_of_run(runs[0], overrides) if runs else None


def _write(
    output: Path,
    places: Sequence[AdapterFolder],
    save: Callable[[Path], None],
    report: CombineReport,
    recipe: Recipe | None,
) -> None:
    """Write the adapter with the tokenizer of the first parent, and a recipe if there is one."""
    first = next((place for place in places if place.run is not None), places[0])
    try:
        with atomic_folder(output) as unfinished:
            save(unfinished)
            for file in sorted(first.folder.iterdir()):
                if file.name not in (CONFIG, WEIGHTS, *_OF_A_RUN) and file.is_file():
                    shutil.copy2(file, unfinished)
            write_digests(unfinished)
            (unfinished / "README.md").write_text(combine_card(report), encoding="utf-8")
            if recipe is not None:
                # What `qlora eval` and `qlora merge` need to know.
                adapter = {"r": report.rank, "alpha": report.rank, "rank_pattern": {}}
                adapter |= {"alpha_pattern": {}, "use_rslora": False}
                made = {"adapter": recipe.adapter.model_copy(update=adapter)}
                run = RunFolder(unfinished)
                run.recipe.write_text(dump_recipe(recipe.model_copy(update=made)), encoding="utf-8")
                combined = report.to_json()
                del combined["evaluations"]  # a key of its own in run.json
                run.update_record(
                    status="combined",
                    base=first.base_identity(),
                    combined=combined,
                    **environment(),
                )
    except OSError as error:
        raise RecipeError(f"--output: {output}: {error.strerror or error}") from error


def _evaluate(
    output: Path, recipe: Recipe, places: Sequence[AdapterFolder]
) -> list[ParentEvaluation]:
    """Evaluate the result against each parent, on the rows and tasks of the recipe."""
    asked = recipe.evaluation
    if not (recipe.data.evaluation_sources or asked.tasks or asked.forgetting):
        return []
    tasks, world = choose_tasks(recipe, None, is_tuned=True), World(recipe.device)
    paths = [*(place.path for place in places), output]
    names = [path.resolve().name for path in paths]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    folders = [*(place.folder for place in places), output]
    answers: dict[str, TaskOutcomes] = {}
    for name, folder in zip(names, folders, strict=True):
        evaluated = EvaluatedModel(name, recipe, folder)
        answers |= evaluate_model(evaluated, recipe, tasks, world, alone=True)
    *parents, made = names
    evaluations = []
    for parent in parents:
        summary = summarize(tasks, {parent: answers[parent], made: answers[made]})
        evaluations.append(
            ParentEvaluation(
                target=str(output),
                models=summary.models,
                differences=summary.differences,
                measures=summary.measures,
                confidence=CONFIDENCE,
                resamples=RESAMPLES,
            )
        )
    return evaluations
