"""Warnings about settings that are valid, plausible, and without effect in a run.

One function for each kind; it yields messages that begin with the dotted key. What cannot be meant
is an error, in `rules.py`. `tests/unit/recipe/test_without_effect.py` goes through all keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_cli.adapters import AdaLoRA, BitFit
from qlora_cli.data.formats import is_verbatim
from qlora_cli.optim.families import AdEMAMix
from qlora_cli.optim.schedules import InverseRoot
from qlora_cli.tasks import MultipleChoice
from qlora_cli.tasks.task import Task

if TYPE_CHECKING:
    from qlora_cli.recipe.schema import Recipe

Warnings = Iterator[str]

_NEARLY_FLAT = 0.9
"""A schedule that ends above this share of the peak has hardly lowered the learning rate."""


def settings_without_effect(recipe: Recipe, max_steps: int | None) -> list[str]:
    """Return a warning for each setting that changes nothing in this run.

    Args:
        max_steps: steps of the run; None if that is not known yet.
    """
    found = [line for check in _ALWAYS for line in check(recipe)]
    if max_steps is not None:
        found += [line for check in _BY_LENGTH for line in check(recipe, max_steps)]
    return found


def hub_settings_are_for_the_hub(recipe: Recipe) -> Warnings:
    model = recipe.model
    if model.revision is not None and Path(model.path).exists():
        yield (
            f"model.revision ({model.revision}) has no effect: model.path ({model.path}) is on "
            "this machine, and only the Hub has revisions"
        )


def text_has_no_turns(recipe: Recipe) -> Warnings:
    data = recipe.data
    sides = {"data.train": data.train_sources, "data.evaluation": data.evaluation_sources}
    sources = [source for side in sides.values() for source in side]
    is_text = [is_verbatim(source.format) for source in sources]
    if data.truncate == "split" and not any(is_text):
        yield (
            "data.truncate (split) cuts the end of rows with roles, as cut_end does: only text "
            "without roles is split"
        )
    if data.chat_template is not None and all(is_text) and not recipe.evaluation.tasks:
        yield "data.chat_template has no effect: the rows are text without roles"
    for name, side in sides.items():
        for source in filter(lambda one: is_verbatim(one.format), side):
            for key in ("learn_roles", "learn_turns"):
                value = getattr(source, key)
                if value != type(source).model_fields[key].default:
                    yield (
                        f"{name}.{key} ({value}) has no effect on {source.path}: its rows are text "
                        "without roles"
                    )


def limits_have_rows(recipe: Recipe) -> Warnings:
    limit = recipe.data.audit.max_equal_answers
    if limit is not None and recipe.objective.rows != "pairs":
        yield (
            f"data.audit.max_equal_answers ({limit:g}) has no effect: objective.type "
            f"({recipe.objective.type}) does not learn from pairs"
        )


def random_choices_of_rows(recipe: Recipe) -> Warnings:
    data = recipe.data
    sources = [*data.train_sources, *data.evaluation_sources]
    if data.seed and data.evaluation_share is None and not any(one.shuffle for one in sources):
        yield (
            f"data.seed ({data.seed}) has no effect: no source has shuffle, and "
            "data.evaluation_share is not given; training.seed orders the training rows"
        )


def evaluations_have_rows(recipe: Recipe) -> Warnings:
    settings, evaluation, data = recipe.training, recipe.evaluation, recipe.data
    if not data.evaluation_sources:
        keys = {
            "training.eval_every": settings.eval_every,
            "evaluation.batch_size": evaluation.batch_size,
            "data.audit.max_overlap": data.audit.max_overlap,
        }
        for key, value in keys.items():
            if value is not None:
                yield (
                    f"{key} ({value:g}) has no effect: there are no evaluation rows; give "
                    "data.evaluation or data.evaluation_share"
                )


def tasks_are_asked(recipe: Recipe) -> Warnings:
    evaluation, tasks = recipe.evaluation, recipe.evaluation.tasks
    of_tasks = {
        "training.tasks_every": recipe.training.tasks_every,
        "evaluation.limit": evaluation.limit,
    }
    for key, value in () if tasks else of_tasks.items():
        if value is not None:
            yield f"{key} ({value}) has no effect: evaluation.tasks is empty"
    default = type(evaluation).model_fields["max_new_tokens"].default
    number = evaluation.max_new_tokens
    of_answers = {
        "evaluation.max_new_tokens": None if number == default else number,
        "evaluation.generation_batch_size": evaluation.generation_batch_size,
    }
    is_asked = any(type(task).evaluate is Task.evaluate for task in tasks)  # it generates
    for key, value in () if is_asked else of_answers.items():
        if value is not None:
            yield f"{key} ({value}) has no effect: no task of evaluation.tasks generates"
    for i, task in enumerate(tasks):
        if isinstance(task, MultipleChoice) and task.as_chat and task.separator != " ":
            yield (
                f"evaluation.tasks[{i}].separator ({task.separator!r}) has no effect with as_chat: "
                "the chat template separates question and option"
            )


def checkpoints_are_saved(recipe: Recipe) -> Warnings:
    keep = recipe.output.keep_checkpoints
    if (
        recipe.training.save_every is None
        and keep > type(recipe.output).model_fields["keep_checkpoints"].default
    ):
        yield (
            f"output.keep_checkpoints ({keep}) has no effect: only the last step is saved; give "
            "training.save_every"
        )


def decayed_weights_are_trained(recipe: Recipe) -> Warnings:
    if recipe.optimizer.weight_decay and isinstance(recipe.adapter, BitFit):
        yield (
            f"optimizer.weight_decay ({recipe.optimizer.weight_decay:g}) has no effect: bitfit "
            "trains only biases, which are never decayed"
        )


def warmup_ends(recipe: Recipe, max_steps: int) -> Warnings:
    warmup = recipe.schedule.warmup_steps
    if warmup > max_steps:
        yield (
            f"schedule.warmup_steps ({warmup:,}) is more than the {max_steps:,} steps of the run: "
            f"the learning rate ends at {max_steps / warmup:.0%} of optimizer.learning_rate"
        )


def inverse_root_decays(recipe: Recipe, max_steps: int) -> Warnings:
    schedule = recipe.schedule
    if not isinstance(schedule, InverseRoot) or schedule.warmup_steps >= max_steps:
        return
    last = schedule.scale(max_steps - 1, max_steps)
    if max_steps > 1 and last > _NEARLY_FLAT:
        yield (
            f"schedule.timescale is long for {max_steps:,} steps: the learning rate only falls to "
            f"{last:.1%} of its peak; a third of the steps after warm-up would halve it"
        )


def slow_means_warm_up(recipe: Recipe, max_steps: int) -> Warnings:
    optimizer = recipe.optimizer
    steps = optimizer.slow_warmup_steps if isinstance(optimizer, AdEMAMix) else None
    if steps is not None and steps > max_steps:
        yield (
            f"optimizer.slow_warmup_steps ({steps:,}) is more than the {max_steps:,} steps of the "
            "run: optimizer.alpha and beta3 never reach their values"
        )


def ranks_are_removed_gradually(recipe: Recipe, max_steps: int) -> Warnings:
    adapter = recipe.adapter
    if not isinstance(adapter, AdaLoRA):
        return
    window = round(adapter.end_at * max_steps) - round(adapter.begin_at * max_steps)
    if adapter.allocate_every >= max(2, window):
        yield (
            f"adapter.allocate_every ({adapter.allocate_every}) is not less than the {window} "
            "steps between begin_at and end_at: all ranks are removed in one step"
        )


def intervals_fit_the_run(recipe: Recipe, max_steps: int) -> Warnings:
    settings = recipe.training
    has_rows, has_tasks = bool(recipe.data.evaluation_sources), bool(recipe.evaluation.tasks)
    after = "only after the last step"
    happens = {
        "log_every": f"{after} is a line logged",
        "save_every": f"{after} is a checkpoint saved",
        "eval_every": f"the loss is evaluated before the first and {after}" if has_rows else "",
        "tasks_every": f"{after} are tasks asked" if has_tasks else "",
    }
    for key, what in happens.items():
        every = getattr(settings, key)
        if what and every is not None and every > max_steps:
            run = f"the {max_steps:,} steps of the run"
            yield f"training.{key} ({every:,}) is more than {run}: {what}"


def patience_can_end(recipe: Recipe, max_steps: int) -> Warnings:
    settings = recipe.training
    every = recipe.steps_between_evaluations
    if settings.patience is None or every is None:
        return
    # The first evaluation may be the best; the one after the last step ends nothing.
    number = max(0, (max_steps - 1) // every - 1)
    if settings.patience > number:
        yield (
            f"training.patience ({settings.patience}) never ends this run: with {max_steps:,} "
            f"steps and {every:,} between evaluations, at most {number} can follow the best one"
        )


def spikes_can_be_found(recipe: Recipe, max_steps: int) -> Warnings:
    spike = recipe.training.spike
    if spike is not None and spike.steps >= max_steps:
        yield (
            f"training.spike.steps ({spike.steps}) is not less than the {max_steps:,} steps of the "
            "run, so no spike is found"
        )


_ALWAYS: tuple[Callable[[Recipe], Warnings], ...] = (
    hub_settings_are_for_the_hub,
    text_has_no_turns,
    random_choices_of_rows,
    limits_have_rows,
    evaluations_have_rows,
    tasks_are_asked,
    checkpoints_are_saved,
    decayed_weights_are_trained,
)
_BY_LENGTH: tuple[Callable[[Recipe, int], Warnings], ...] = (
    warmup_ends,
    inverse_root_decays,
    slow_means_warm_up,
    ranks_are_removed_gradually,
    intervals_fit_the_run,
    patience_can_end,
    spikes_can_be_found,
)
