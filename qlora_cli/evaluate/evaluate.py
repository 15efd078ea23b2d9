"""Evaluate one or two models on the same examples."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from qlora_cli._compat import quiet_libraries
from qlora_cli.common.atomic_files import atomic_file
from qlora_cli.data.prepared.cache import read_data
from qlora_cli.distributed.world import World
from qlora_cli.errors import RecipeError
from qlora_cli.evaluate.bootstrap import CONFIDENCE, RESAMPLES
from qlora_cli.evaluate.report import (
    EvaluationReport,
    confusion_tables,
    summarize,
    warn_of_regressions,
)
from qlora_cli.evaluate.scorer import ModelScorer
from qlora_cli.evaluate.start import start_of
from qlora_cli.evaluate.target import EvaluatedModel, find_model, own_recipe
from qlora_cli.models.heads import lacks_head
from qlora_cli.models.loading import compute_dtype, load_base
from qlora_cli.models.tokenizer import set_stop_tokens, stop_token_ids
from qlora_cli.recipe.schema import Recipe
from qlora_cli.runs.model_card import write_cards
from qlora_cli.runs.run_folder import RunFolder, Weights, is_run
from qlora_cli.tasks import TaskConfig
from qlora_cli.tasks.forgetting import Divergence, Forgetting
from qlora_cli.tasks.objective_tasks import task_of
from qlora_cli.tasks.task import Outcome, Task, TaskOutcomes, read_tasks

log = logging.getLogger("qlora")

BaseContext = Callable[[], AbstractContextManager[Any]]
"""Switches a tuned model to its base for the length of a `with` block."""


def evaluate(
    target: Path,
    overrides: Sequence[str] = (),
    *,
    weights: Weights = "last",
    tasks: Sequence[str] | None = None,
    compare: Path | None = None,
    recipe: Path | None = None,
    records: Path | None = None,
) -> EvaluationReport:
    """Evaluate a run against its base, or against any other model.

    Args:
        target: a run, a model folder, or a recipe (whose base is evaluated alone).
        weights: which weights of a run.
        tasks: names of tasks, `loss` among them; None runs all tasks of the recipe.
        compare: a run or a model folder to compare with, instead of the base.
        recipe: evaluation data and tasks, if `target` is a model folder.
        records: file for prompts and answers, one example per line. None writes them into the run
            folder if a run is evaluated exactly as its recipe says.

    Raises:
        QloraError: the model, the data or a task cannot be used.
    """
    quiet_libraries()
    is_as_trained = is_run(target) and not (overrides or tasks or compare or recipe)
    if is_as_trained and records is None:
        records = RunFolder(target).answers
    found = _find_models(target, overrides, weights, compare, recipe)
    settings = found[-1].recipe
    for model in found:
        _refuse_other_head(model, settings)
    is_tuned = all(model.trained for model in found)
    chosen = choose_tasks(settings, tasks, is_tuned=is_tuned)
    world = World(settings.device)
    outcomes: dict[str, TaskOutcomes] = {}
    for model in found:
        outcomes |= evaluate_model(model, settings, chosen, world, alone=bool(compare))
    summary = summarize(chosen, outcomes)
    report = EvaluationReport(
        target=str(target),
        compare=None if compare is None else str(compare),
        weights=weights if found[-1].trained else None,
        models=summary.models,
        differences=summary.differences,
        measures=summary.measures,
        confidence=CONFIDENCE,
        resamples=RESAMPLES,
        records=None if records is None else str(records),
        confusion=confusion_tables(chosen, outcomes),
    )
    if records is not None:
        write_records(records, chosen, outcomes)
    if is_as_trained:
        # An evaluation with other settings describes something else, so the run does not keep it.
        RunFolder(target).update_record(evaluation=report.to_json())
        write_cards(RunFolder(target))
    warn_of_regressions(summary)
    return report


def _find_models(
    target: Path,
    overrides: Sequence[str],
    weights: Weights,
    compare: Path | None,
    recipe: Path | None,
) -> list[EvaluatedModel]:
    """Find the target, preceded by the model to compare it with, if there is one."""
    known = own_recipe(target) or (compare and own_recipe(compare))
    if recipe is not None and known is not None:
        raise RecipeError(
            f"--recipe: {known} already has evaluation data and tasks",
            hint="--recipe is for model folders; use --set to change a run or a recipe",
        )
    paths = [target] if compare is None else [compare, target]
    models = [find_model(path, overrides, weights, known or recipe) for path in paths]
    if len({model.name for model in models}) < len(models):
        return [replace(m, name=str(path)) for m, path in zip(models, paths, strict=True)]
    return models


def _refuse_other_head(model: EvaluatedModel, settings: Recipe) -> None:
    """Raise RecipeError if a model has another head than the one that is evaluated."""
    own, wanted = model.recipe.objective, settings.objective
    if own.head != wanted.head:
        raise RecipeError(
            f"{model.name} was trained with objective.type {own.type}, and the other model with "
            f"{wanted.type}: they have no measure in common",
            hint="compare models with the same head and labels, or evaluate each alone",
        )


def choose_tasks(recipe: Recipe, names: Sequence[str] | None, *, is_tuned: bool) -> list[Task]:
    """Choose tasks by name, or all that the recipe has. The loss comes first.

    Args:
        is_tuned: every model has a base to measure its divergence from.

    Raises:
        RecipeError: a name is unknown, or the recipe has nothing to evaluate.
    """
    has_rows = bool(recipe.data.evaluation_sources)
    tasks: list[Task] = [task_of(recipe.objective)] if has_rows else []
    tasks += recipe.evaluation.tasks
    if recipe.evaluation.forgetting is not None:
        tasks.append(Forgetting(text=recipe.evaluation.forgetting))
        if has_rows and is_tuned:
            tasks.append(Divergence())
    known = {task.label: task for task in tasks}
    if names is not None:
        return [known.get(name) or _default_task(name, known, has_rows) for name in names]
    if not known:
        raise RecipeError(
            "there is nothing to evaluate: the recipe has neither data.evaluation nor "
            "evaluation.tasks",
            hint="--set data.evaluation.path=held_out.jsonl (and data.evaluation.format if it is "
            "not messages)",
        )
    return tasks


def _default_task(name: str, known: dict[str, Task], has_rows: bool) -> Task:
    """Make a task that is not in the recipe, with the default settings of its type."""
    try:
        task: Task = TypeAdapter(TaskConfig).validate_python({"type": name})
    except ValidationError as error:
        raise RecipeError(
            f"--tasks: unknown task {name}; the recipe has {', '.join(known) or 'none'}",
            hint="a task type that needs no settings can be named too; add one that needs "
            "settings to evaluation.tasks",
        ) from error
    if not has_rows:
        raise RecipeError(f"--tasks: {name} needs data.evaluation: rows to answer")
    return task


def evaluate_model(
    evaluated: EvaluatedModel, settings: Recipe, tasks: Sequence[Task], world: World, *, alone: bool
) -> Iterator[tuple[str, TaskOutcomes]]:
    """Run all tasks on a model and, unless it is `alone`, on its base before it.

    Args:
        settings: recipe with the evaluation data and settings.

    Yields:
        The name of a model, and the outcomes of each task.
    """
    tokenizer = evaluated.load_tokenizer()
    virtual_tokens = evaluated.recipe.adapter.virtual_tokens if evaluated.trained else 0
    context = evaluated.recipe.model.read_context(virtual_tokens)
    task_items = read_tasks(
        tasks,
        settings.data,
        tokenizer,
        limit=settings.evaluation.limit,
        context=context,
        max_new_tokens=settings.evaluation.max_new_tokens,
    )
    stops = stop_token_ids(evaluated.trained) if evaluated.trained else []
    if sources := settings.data.evaluation_sources:
        held_out = read_data(
            "evaluation",
            settings.data,
            sources,
            tokenizer,
            context=context,
            objective=settings.objective,
        )
        stops = [*stops, *held_out.stop_token_ids]
    recipe = evaluated.recipe
    dtype = compute_dtype(recipe.quantization, recipe.training.precision, world)
    model = load_base(recipe.model, recipe.quantization, dtype, world.device, recipe.objective.head)
    set_stop_tokens(model, stops)

    def run_tasks(
        name: str,
        model: Any,
        as_base: BaseContext | None = None,
        as_start: BaseContext | None = None,
    ) -> TaskOutcomes:
        scorer = ModelScorer(name, model, settings, tokenizer, dtype, world, as_base, as_start)
        outcomes: TaskOutcomes = {}
        for task, items in task_items:
            log.info("%s: %s, %d examples", name, task.label, len(items))
            outcomes[task.label] = task.evaluate(scorer, items)
        return outcomes

    has_head = not lacks_head(model)
    if evaluated.trained is None:
        if not has_head:
            raise RecipeError(
                f"{recipe.model.path} has no head for objective.type ({recipe.objective.type}): "
                "there is nothing to evaluate before training",
                hint="qlora train it, and evaluate the run",
            )
        yield evaluated.name, run_tasks(evaluated.name, model)
        return
    if not alone and has_head:
        yield "base", run_tasks("base", model)
    name = evaluated.name if alone else "tuned"
    tuned: Any = recipe.adapter.load(model, evaluated.trained)

    @contextmanager
    def as_base() -> Iterator[Any]:
        if recipe.adapter.trains_base:
            yield load_base_again()
        else:
            with tuned.disable_adapter():
                yield tuned

    @cache
    def load_base_again() -> Any:
        # The trained weights have replaced those of the base.
        return load_base(
            recipe.model, recipe.quantization, dtype, world.device, recipe.objective.head
        )

    yield name, run_tasks(name, tuned, as_base, start_of(recipe, tuned))


def write_records(path: Path, tasks: Sequence[Task], models: dict[str, TaskOutcomes]) -> None:
    """Write one JSON line per example, with the answers of all models.

    Raises:
        RecipeError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as unfinished, unfinished.open("w", encoding="utf-8") as file:
            for task in tasks:
                for outcomes in zip(*(one[task.label] for one in models.values()), strict=False):
                    line = _record(task, dict(zip(models, outcomes, strict=True)))
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
    except OSError as error:
        raise RecipeError(f"--records: {path}: {error.strerror}") from error


def _record(task: Task, outcomes: dict[str, Outcome]) -> dict[str, Any]:
    one = next(iter(outcomes.values()))
    shown = {"prompt": one.prompt, "reference": one.reference} if one.prompt else {}
    models = {
        name: {
            **({"answer": outcome.answer} if one.prompt else {}),
            **{k: v for k, v in outcome.values.items() if not k.startswith("_")},
        }
        for name, outcome in outcomes.items()
    }
    return {"task": task.label, "row": one.place, **shown, "models": models}
