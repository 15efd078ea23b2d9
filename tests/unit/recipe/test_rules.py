"""Each rule of a recipe reports its problem, and only that one."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from qlora_cli.recipe.load import LoadedRecipe
from qlora_cli.recipe.rules import RECIPE_RULES, TRAINING_RULES

BROKEN = {
    "stop_after_is_a_duration": (
        "training: {stop_after: 3x}\n",
        'training.stop_after: "3x" is not a duration; use e.g. 3h55m',
    ),
    "epochs_or_max_steps": (
        "training: {epochs: 2, max_steps: 10}\n",
        "training.epochs (2) and training.max_steps (10) are both given",
    ),
    "micro_batches_divide_the_batch": (
        "training: {batch_size: 6}\n",
        "training.batch_size (6) must be a multiple of training.micro_batch_size (4)",
    ),
    "going_back_needs_checkpoints": (
        "training: {spike: {action: go_back}}\n",
        "training.spike.action (go_back) restores a checkpoint: give training.save_every",
    ),
    "patience_needs_evaluations": (
        "training: {patience: 2}\n",
        "training.patience (2) counts evaluations: give training.eval_every",
    ),
    "adapter_can_train_quantized_base": (
        "adapter: {type: full}\nquantization: {type: nf4}\n",
        "adapter.type (full) cannot train quantization.type (nf4): ",
    ),
    "adapter_supports_packing": (
        "adapter: {type: prefix}\ndata: {train: {path: rows.jsonl}, packing: true}\n",
        "adapter.type (prefix) cannot train on data.packing (true): ",
    ),
    "adapter_supports_weight_averaging": (
        "adapter: {type: adalora}\noptimizer: {type: schedule_free_adamw}\n",
        "adapter.type (adalora) and optimizer.type (schedule_free_adamw) cannot be combined: ",
    ),
    "precision_fits_quantization": (
        "training: {precision: fp32}\nquantization: {type: none, dtype: bfloat16}\n",
        "training.precision (fp32) and quantization.dtype (bfloat16) cannot be combined: ",
    ),
    "schedule_free_optimizer_has_a_constant_schedule": (
        "optimizer: {type: schedule_free_adamw}\nschedule: {type: cosine}\n",
        "optimizer.type (schedule_free_adamw) averages the weights instead of decaying",
    ),
    "tasks_have_rows": (
        "evaluation: {tasks: [{type: exact_match}]}\n",
        "evaluation.tasks needs data.evaluation: rows to answer",
    ),
    "task_names_are_unique": (
        "data: {train: {path: rows.jsonl}, evaluation: {path: held.jsonl}}\n"
        "evaluation: {tasks: [{type: exact_match}, {type: exact_match}]}\n",
        'evaluation.tasks: duplicate task name "exact_match"; rename one',
    ),
    "best_by_is_measured": (
        "evaluation: {best_by: other}\n",
        "evaluation.best_by (other) is not a measure of any task; it takes one of loss",
    ),
    "patience_has_rows_for_the_loss": (
        "training: {patience: 2, eval_every: 5}\n",
        "training.patience (2) needs the loss on data.evaluation, which is missing",
    ),
    "evaluation_sources_have_no_weight": (
        "data: {train: {path: rows.jsonl}, evaluation: {path: held.jsonl, weight: 2}}\n",
        "data.evaluation.weight (2) would change nothing: ",
    ),
    "feedback_steps_have_several_rows": (
        "objective: {type: kto}\ntraining: {batch_size: 1, micro_batch_size: 1}\n",
        "training.batch_size (1) is too small for objective.type (kto)",
    ),
    "adapter_can_train_a_head": (
        "objective: {type: reward}\nadapter: {type: prompt}\n",
        "adapter.type (prompt) cannot be combined with objective.type (reward)",
    ),
    "a_head_predicts_no_tokens": (
        "objective: {type: reward}\nevaluation: {forgetting: {path: text.txt}}\n",
        "evaluation.forgetting needs a model that predicts tokens",
    ),
}
"""For each rule, a recipe that breaks it, and how its message begins."""

START = "model: {path: base}\noutput: {dir: run}\n"
TRAIN = "data: {train: {path: rows.jsonl}}\n"

RULES = [rule.__name__ for rule in (*TRAINING_RULES, *RECIPE_RULES)]


def test_each_rule_has_a_recipe_that_breaks_it() -> None:
    assert list(BROKEN) == RULES


@pytest.mark.parametrize("rule", BROKEN)
def test_a_broken_rule_is_reported_with_its_line(
    problems: Callable[..., list[str]], rule: str
) -> None:
    text, message = BROKEN[rule]
    (found,) = problems(START + text + ("" if "data:" in text else TRAIN))
    place, _, words = found.partition("  ")
    assert words.startswith(message)
    assert int(place.split(":")[1]) in range(3, 3 + text.count("\n"))


def test_best_by_a_task_needs_tasks_in_training(
    load: Callable[..., LoadedRecipe], problems: Callable[..., list[str]], minimal: str
) -> None:
    text = minimal.replace("rows.jsonl}}", "rows.jsonl}, evaluation: {path: held.jsonl}}")
    text += "evaluation: {tasks: [{type: exact_match}], best_by: exact_match}\n"
    (found,) = problems(text)
    assert "evaluation.best_by (exact_match) needs training.tasks_every" in found
    assert load(text, "training.tasks_every=5").recipe.evaluation.best_by == "exact_match"
