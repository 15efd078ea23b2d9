"""What came out: base and tuned model, or any two models, on the same examples."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from qlora_cli._compat import quiet_libraries
from qlora_cli.common.atomic_files import atomic_file
from qlora_cli.data.prepared.cache import read_data
from qlora_cli.data.render.chat_template import read_chat_template
from qlora_cli.distributed.world import World
from qlora_cli.errors import RecipeError
from qlora_cli.evaluate.bootstrap import CONFIDENCE, RESAMPLES, columns, estimates
from qlora_cli.evaluate.scorer import ModelScorer
from qlora_cli.models.base import load_tokenizer, set_stop_tokens, stop_token_ids
from qlora_cli.models.loading import compute_dtype, load_base
from qlora_cli.recipe.load import load_recipe
from qlora_cli.recipe.schema import Recipe
from qlora_cli.runs.model_card import write_cards
from qlora_cli.runs.run_folder import RunFolder, Weights, is_run, recipe_of_run
from qlora_cli.tasks import Loss, TaskConfig
from qlora_cli.tasks.forgetting import Drift, Forgetting
from qlora_cli.tasks.task import Outcome, Task, Values, read_tasks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

log = logging.getLogger("qlora")

AsBase = Callable[[], AbstractContextManager[Any]]

Answers = dict[str, list[Outcome]]
"""Name of a task -> outcomes of one model, in the order of the questions."""


def evaluate(
    target: Path,
    overrides: Sequence[str] = (),
    *,
    weights: Weights = "last",
    tasks: Sequence[str] | None = None,
    compare: Path | None = None,
    recipe: Path | None = None,
    records: Path | None = None,
) -> dict[str, Any]:
    """Measure a run beside its base, or two models beside each other.

    Args:
        target: a run, a model folder, or a recipe (whose base is then measured alone).
        weights: which of a run's weights.
        tasks: names of tasks, `loss` among them; None for all that the recipe has.
        compare: a run or a model folder to measure `target` beside, in place of the base.
        recipe: what says what to ask, where `target` is a model folder.
        records: file for the answers, one example a line; None writes them into the folder of a
            run that is measured as its recipe says.

    Returns:
        {"target", "compare", "weights", "models": {name: {measure: E}}, "differences": {measure:
        E}, "measures": {measure: {"n", "is_share", "lower_is_better"}}, "confidence",
        "resamples", "records"}, where E is {"value", "low", "high"}. A difference is the second
        model minus the first; where only one is measured there are none.

    Raises:
        QloraError: in one of its kinds, with its exit code.
    """
    quiet_libraries()
    asked = _recipe_of(target) or (compare and _recipe_of(compare))
    if recipe is not None and asked is not None:
        raise RecipeError(
            f"--recipe: {asked} says what is asked already",
            hint="--recipe is for model folders; --set changes what a run or a recipe says",
        )
    asked = asked or recipe
    subjects = [find_subject(target, overrides, weights, asked)]
    if compare is not None:
        subjects.insert(0, find_subject(compare, overrides, weights, asked))
        if subjects[0].name == subjects[1].name:
            paths = str(compare), str(target)
            subjects = [replace(s, name=path) for s, path in zip(subjects, paths, strict=True)]
    settings = subjects[-1].recipe
    is_tuned = all(subject.trained for subject in subjects)
    chosen = choose_tasks(settings, tasks, is_tuned=is_tuned)
    world = World()
    models: dict[str, Answers] = {}
    for subject in subjects:
        for name, answers in examine(subject, settings, chosen, world, alone=bool(compare)):
            models[name] = answers

    is_as_trained = is_run(target) and not (overrides or tasks or compare or recipe)
    if is_as_trained and records is None:
        records = RunFolder(target).answers
    report = {
        "target": str(target),
        "compare": compare and str(compare),
        "weights": weights if subjects[-1].trained else None,
        **summarize(chosen, models),
        "confidence": CONFIDENCE,
        "resamples": RESAMPLES,
        "records": records and str(records),
    }
    if records is not None:
        write_records(records, chosen, models)
    if is_as_trained:
        # Anything else is a measurement of something else, and belongs to whoever asked.
        RunFolder(target).update_record(evaluation=report)
        write_cards(RunFolder(target))
    warn_of_losses(report)
    return report


@dataclass(frozen=True, slots=True)
class Subject:
    """What is measured: a base model, with trained weights on it or without."""

    name: str
    recipe: Recipe
    """Says how the model is loaded."""
    trained: Path | None = None

    def load_tokenizer(self) -> PreTrainedTokenizerFast:
        """The one that it was trained with, where it was."""
        if self.trained is None:
            template = read_chat_template(self.recipe.data.chat_template)
            return self.recipe.model.load_tokenizer(template)
        return load_tokenizer(self.trained, trust_remote_code=self.recipe.model.trust_remote_code)


def _recipe_of(path: Path) -> Path | None:
    """The recipe that a path brings along; a model folder brings none."""
    if is_run(path):
        return RunFolder(path).recipe
    return None if path.is_dir() or path.suffix == ".gguf" else path


def find_subject(
    path: Path, overrides: Sequence[str], weights: Weights, asked: Path | None
) -> Subject:
    """A run, a model folder or a recipe, as what is measured.

    Args:
        asked: the recipe that says what a model folder is asked.

    Raises:
        RecipeError: it is none of them, or a run without the weights.
    """
    if is_run(path):
        run = RunFolder(path)
        trained = run.weights(weights)
        return Subject(path.resolve().name, recipe_of_run(run, overrides), trained)
    if not path.exists():
        raise RecipeError(f"{path}: no such file or folder")
    own = _recipe_of(path)
    if own is not None:
        return Subject("base", load_recipe(own, overrides).recipe)
    if path.is_dir() and not (path / "config.json").is_file():
        found = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
        raise RecipeError(
            f"{path} holds neither a run nor a model (found: {found})",
            hint="give the output.dir of a run, a model folder or a recipe; a run that failed "
            "before its first step leaves nothing to measure",
        )
    if asked is None:
        raise RecipeError(
            f"{path} is a model, which does not say what it is to be asked",
            hint="--recipe names the recipe whose evaluation data and tasks are taken",
        )
    # The model is measured as it is written, unless it is asked for otherwise.
    place = f"model.path={json.dumps(str(path))}"
    loaded = load_recipe(asked, ["quantization.type=none", *overrides, place])
    return Subject(path.resolve().name, loaded.recipe)


def choose_tasks(recipe: Recipe, names: Sequence[str] | None, *, is_tuned: bool) -> list[Task]:
    """The tasks of these names, or all that the recipe has; the loss is the first of them.

    Args:
        is_tuned: all models have a base that they can be told from.

    Raises:
        RecipeError: there is no such task, or none at all.
    """
    has_rows = bool(recipe.data.evaluation_sources)
    tasks: list[Task] = [Loss()] if has_rows else []
    tasks += recipe.evaluation.tasks
    if recipe.evaluation.forgetting is not None:
        tasks.append(Forgetting(text=recipe.evaluation.forgetting))
        if has_rows and is_tuned:
            tasks.append(Drift())
    known = {task.label: task for task in tasks}
    if names is not None:
        return [known.get(name) or _plain_task(name, known, has_rows) for name in names]
    if not known:
        raise RecipeError(
            "there is nothing to measure: the recipe has neither data.evaluation nor "
            "evaluation.tasks",
            hint="--set data.evaluation.path=held_out.jsonl (and data.evaluation.format if it is "
            "not messages)",
        )
    return tasks


def _plain_task(name: str, known: dict[str, Task], has_rows: bool) -> Task:
    """A task that the recipe does not have, with the defaults of its type."""
    try:
        task: Task = TypeAdapter(TaskConfig).validate_python({"type": name})
    except ValidationError as error:
        raise RecipeError(
            f"--tasks: {name} is no task here; there are {', '.join(known) or 'none'}",
            hint="a type that needs no settings can be named too; one that does is written down "
            "in evaluation.tasks",
        ) from error
    if not has_rows:
        raise RecipeError(f"--tasks: {name} needs data.evaluation: rows to answer")
    return task


def examine(
    subject: Subject, settings: Recipe, tasks: Sequence[Task], world: World, *, alone: bool
) -> Iterator[tuple[str, Answers]]:
    """Ask the model of a subject all questions; before it, unless it is `alone`, its base.

    Args:
        settings: the recipe that says what is asked.
    """
    tokenizer = subject.load_tokenizer()
    exam = read_tasks(tasks, settings.data, tokenizer, limit=settings.evaluation.limit)
    stops = stop_token_ids(subject.trained) if subject.trained else []
    if sources := settings.data.evaluation_sources:
        held_out = read_data("evaluation", settings.data, sources, tokenizer)
        stops = [*stops, *held_out.stop_token_ids]
    dtype = compute_dtype(subject.recipe.quantization, subject.recipe.training.precision, world)
    model = load_base(subject.recipe.model, subject.recipe.quantization, dtype, world.device)
    set_stop_tokens(model, stops)

    def answers_of(name: str, model: Any, as_base: AsBase | None = None) -> Answers:
        scorer = ModelScorer(name, model, settings, tokenizer, dtype, world, as_base)
        answers: Answers = {}
        for task, questions in exam:
            log.info("%s: %s, %d examples", name, task.label, len(questions))
            answers[task.label] = task.examine(scorer, questions)
        return answers

    if subject.trained is None:
        yield subject.name, answers_of(subject.name, model)
        return
    if not alone:
        yield "base", answers_of("base", model)
    name = subject.name if alone else "tuned"
    tuned: Any = subject.recipe.adapter.load(model, subject.trained)

    @contextmanager
    def as_base() -> Iterator[Any]:
        if subject.recipe.adapter.trains_base:
            yield base_again()
        else:
            with tuned.disable_adapter():
                yield tuned

    @cache
    def base_again() -> Any:
        # Its weights are gone: the trained ones are in their place.
        return load_base(subject.recipe.model, subject.recipe.quantization, dtype, world.device)

    yield name, answers_of(name, tuned, as_base)


def summarize(tasks: Sequence[Task], models: dict[str, Answers]) -> dict[str, Any]:
    """The figures of each model with their intervals, and the differences of the second."""
    report: dict[str, Any] = {"models": {m: {} for m in models}, "differences": {}, "measures": {}}
    for task in tasks:
        outcomes = [answers[task.label] for answers in models.values()]
        first, *others = ([outcome.place for outcome in one] for one in outcomes)
        values = [columns(one) for one in outcomes]
        is_same = all(places == first for places in others)
        if not is_same:
            log.warning(
                "%s: the models were not asked about the same rows, so there is no difference to "
                "give; data.max_length may be too short for one of their tokenizers",
                task.label,
            )
        is_same_text = is_same and all(_have_equal_tokens(values[0], one) for one in values)
        if is_same and not is_same_text:
            log.warning(
                "%s: the models have different tokenizers, and what is counted by the token cannot "
                "be compared",
                task.label,
            )
        for name, measure in task.named_measures():
            is_paired = is_same_text if measure.is_per_token else is_same
            groups = [values] if is_paired else [[one] for one in values]
            found = [estimates(measure, group) for group in groups]
            singles = [one for single, _ in found for one in single]
            for model, estimate in zip(models, singles, strict=True):
                report["models"][model][name] = estimate.record()
            for _, differences in found:
                for difference in differences:
                    report["differences"][name] = difference.record()
            report["measures"][name] = {
                "n": len(first),
                "is_share": measure.is_share,
                "lower_is_better": measure.lower_is_better,
            }
    return report


def _have_equal_tokens(first: Values, second: Values) -> bool:
    """Whether the same texts came to as many tokens."""
    return "tokens" not in first or bool((first["tokens"] == second["tokens"]).all())


def write_records(path: Path, tasks: Sequence[Task], models: dict[str, Answers]) -> None:
    """One JSON object a line for each example, with the answers of all models.

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
    asked = {"prompt": one.prompt, "reference": one.reference} if one.prompt else {}
    models = {
        name: {
            **({"answer": outcome.answer} if one.prompt else {}),
            **{k: v for k, v in outcome.values.items() if not k.startswith("_")},
        }
        for name, outcome in outcomes.items()
    }
    return {"task": task.label, "row": one.place, **asked, "models": models}


def warn_of_losses(report: dict[str, Any]) -> None:
    """What the second model is worse at than the first, beyond chance."""
    told = set()
    for name, difference in report["differences"].items():
        ends = difference["low"], difference["high"]
        task = name.partition(".")[0]
        if None in ends or task in told:
            continue
        lower_is_better = report["measures"][name]["lower_is_better"]
        if lower_is_better is None or (ends[0] <= 0 if lower_is_better else ends[1] >= 0):
            continue
        told.add(task)  # its other measures are made of the same answers
        first, second = report["models"]
        log.warning(
            "%s: %s is worse than %s, %.4g against %.4g (difference %.4g to %.4g)%s",
            name,
            second,
            first,
            *(report["models"][model][name]["value"] for model in (second, first)),
            *ends,
            _ADVICE if task == "forgetting" else "",
        )


_ADVICE = (
    ": it lost some of what the base could do. Fewer steps, a lower optimizer.learning_rate, a "
    "smaller adapter.r, or general rows among data.train keep more of it"
)
