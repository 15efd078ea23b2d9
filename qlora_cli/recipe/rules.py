"""Rules across the fields and sections of a recipe: one function each, which yields its problems.

A message begins with, or names, the dotted keys that disagree: the loader finds their lines.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from qlora_cli.data.sources import Source
    from qlora_cli.recipe.schema import Recipe
    from qlora_cli.recipe.sections import Training

ConfigT = TypeVar("ConfigT")
Problems = Iterator[str]

_DURATION = re.compile(r"([0-9]+(\.[0-9]+)?[dhms])+")

_BUILT_IN = ("loss", "forgetting", "kl")
"""Names of what `qlora eval` measures by itself."""


def apply_rules(rules: Sequence[Callable[[ConfigT], Problems]], config: ConfigT) -> None:
    """Raise ValueError with the problems that rules find, one per line."""
    if problems := [problem for rule in rules for problem in rule(config)]:
        raise ValueError("\n".join(problems))


def stop_after_is_a_duration(training: Training) -> Problems:
    if training.stop_after is not None and not _DURATION.fullmatch(training.stop_after):
        yield f'training.stop_after: "{training.stop_after}" is not a duration; use e.g. 3h55m'


def epochs_or_max_steps(training: Training) -> Problems:
    if training.epochs is not None and training.max_steps is not None:
        yield (
            f"training.epochs ({training.epochs:g}) and training.max_steps ({training.max_steps}) "
            "are both given; remove one of them, e.g. --set training.epochs=null"
        )


def micro_batches_divide_the_batch(training: Training) -> Problems:
    size = training.micro_batch_size
    if size != "auto" and training.batch_size % size:
        yield (
            f"training.batch_size ({training.batch_size}) must be a multiple of "
            f"training.micro_batch_size ({size})"
        )


def going_back_needs_checkpoints(training: Training) -> Problems:
    if training.spike and training.spike.action == "go_back" and training.save_every is None:
        yield (
            "training.spike.action (go_back) restores a checkpoint: give training.save_every too"
        )


def patience_needs_evaluations(training: Training) -> Problems:
    evaluates = training.eval_every is not None or training.tasks_every is not None
    if training.patience is not None and not evaluates:
        yield (
            f"training.patience ({training.patience}) counts evaluations: give training.eval_every "
            "too (or tasks_every)"
        )


TRAINING_RULES = (
    stop_after_is_a_duration,
    epochs_or_max_steps,
    micro_batches_divide_the_batch,
    going_back_needs_checkpoints,
    patience_needs_evaluations,
)


def adapter_can_train_quantized_base(recipe: Recipe) -> Problems:
    adapter, quantization = recipe.adapter, recipe.quantization
    if reason := adapter.no_quantization.get(quantization.type):
        yield (
            f"adapter.type ({adapter.type}) cannot train quantization.type ({quantization.type}): "
            f"{reason}; use quantization.type none, or adapter.type lora"
        )


def adapter_supports_packing(recipe: Recipe) -> Problems:
    adapter = recipe.adapter
    if recipe.data.packing and adapter.no_packing:
        yield (
            f"adapter.type ({adapter.type}) cannot train on data.packing (true): "
            f"{adapter.no_packing}; use data.packing false"
        )


def adapter_supports_weight_averaging(recipe: Recipe) -> Problems:
    adapter, optimizer = recipe.adapter, recipe.optimizer
    if optimizer.is_schedule_free and adapter.no_averaging:
        yield (
            f"adapter.type ({adapter.type}) and optimizer.type ({optimizer.type}) cannot be "
            f"combined: {adapter.no_averaging}; use optimizer.type adamw"
        )


def precision_fits_quantization(recipe: Recipe) -> Problems:
    key, dtype = recipe.quantization.held_in
    if recipe.training.precision == "fp32" and dtype in ("bfloat16", "float16"):
        yield (
            f"training.precision (fp32) and quantization.{key} ({dtype}) cannot be combined: "
            "16-bit weights are multiplied in 16 bit; use training.precision auto, or "
            f"quantization.{key} auto"
        )


def schedule_free_optimizer_has_a_constant_schedule(recipe: Recipe) -> Problems:
    optimizer, schedule = recipe.optimizer, recipe.schedule
    if optimizer.is_schedule_free and schedule.decays:
        yield (
            f"optimizer.type ({optimizer.type}) averages the weights instead of decaying the "
            f"learning rate, but schedule.type ({schedule.type}) decays it; use schedule.type "
            "constant (warm-up is possible)"
        )


def tasks_have_rows(recipe: Recipe) -> Problems:
    needs_rows = any(task.data is None for task in recipe.evaluation.tasks)
    if needs_rows and not recipe.data.evaluation_sources:
        yield "evaluation.tasks needs data.evaluation: rows to answer"


def task_names_are_unique(recipe: Recipe) -> Problems:
    names = [*_BUILT_IN, *(task.label for task in recipe.evaluation.tasks)]
    for name in dict.fromkeys(names):
        if names.count(name) > 1:
            yield (
                f'evaluation.tasks: duplicate task name "{name}"; rename one '
                f"({', '.join(_BUILT_IN)} are built in)"
            )


def best_by_is_measured(recipe: Recipe) -> Problems:
    best_by = recipe.evaluation.best_by
    if best_by not in recipe.measures:
        yield (
            f"evaluation.best_by ({best_by}) is not a measure of any task; it takes one of "
            f"{', '.join(recipe.measures)}"
        )
    elif not recipe.is_chosen_by_objective and recipe.training.tasks_every is None:
        yield (
            f"evaluation.best_by ({best_by}) needs training.tasks_every: otherwise no task runs "
            "during training"
        )


def patience_has_rows_for_the_loss(recipe: Recipe) -> Problems:
    patience, uses_loss = recipe.training.patience, recipe.is_chosen_by_objective
    if patience is not None and uses_loss and not recipe.data.evaluation_sources:
        yield (
            f"training.patience ({patience}) needs the loss on data.evaluation, which is missing"
        )


def evaluation_sources_have_no_weight(recipe: Recipe) -> Problems:
    held_out = recipe.data.evaluation
    sources: dict[str, Source | None] = {}
    if isinstance(held_out, list):
        sources |= {f"data.evaluation[{i}]": source for i, source in enumerate(held_out)}
    else:
        sources["data.evaluation"] = held_out
    tasks = enumerate(recipe.evaluation.tasks)
    sources |= {f"evaluation.tasks[{i}].data": task.data for i, task in tasks}
    sources["evaluation.forgetting"] = recipe.evaluation.forgetting
    for name, source in sources.items():
        if source is not None and source.weight != 1:
            yield (
                f"{name}.weight ({source.weight:g}) would change nothing: evaluation reads each "
                "row once; leave it out, or give it to a source in data.train"
            )


def feedback_steps_have_several_rows(recipe: Recipe) -> Problems:
    if recipe.objective.rows == "feedback" and recipe.training.batch_size < 2:
        yield (
            f"training.batch_size ({recipe.training.batch_size}) is too small for objective.type "
            f"({recipe.objective.type}): it estimates the divergence from the reference from the "
            "other answers of a step; use training.batch_size 8 or more"
        )


def adapter_can_train_a_head(recipe: Recipe) -> Problems:
    adapter = recipe.adapter
    if recipe.objective.head is not None and adapter.no_head:
        yield (
            f"adapter.type ({adapter.type}) cannot be combined with objective.type "
            f"({recipe.objective.type}): {adapter.no_head}; use adapter.type lora"
        )


def a_head_predicts_no_tokens(recipe: Recipe) -> Problems:
    if recipe.objective.head is None:
        return
    settings = {
        "evaluation.tasks": bool(recipe.evaluation.tasks),
        "evaluation.forgetting": recipe.evaluation.forgetting is not None,
    }
    for key, is_given in settings.items():
        if is_given:
            yield (
                f"{key} needs a model that predicts tokens, and objective.type "
                f"({recipe.objective.type}) puts a head that scores rows in place of that; remove "
                "it: the measures of the head are taken without a task"
            )


RECIPE_RULES = (
    adapter_can_train_quantized_base,
    adapter_supports_packing,
    adapter_supports_weight_averaging,
    precision_fits_quantization,
    schedule_free_optimizer_has_a_constant_schedule,
    tasks_have_rows,
    task_names_are_unique,
    best_by_is_measured,
    patience_has_rows_for_the_loss,
    evaluation_sources_have_no_weight,
    feedback_steps_have_several_rows,
    adapter_can_train_a_head,
    a_head_predicts_no_tokens,
)
