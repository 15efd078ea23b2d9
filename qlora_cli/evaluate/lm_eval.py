"""Evaluate a model with lm-evaluation-harness, with its own tokenizer and chat template."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_cli._compat import quiet_libraries
from qlora_cli.common.report import Report
from qlora_cli.distributed.world import World
from qlora_cli.errors import RecipeError
from qlora_cli.evaluate.target import find_model
from qlora_cli.models.context import context_of
from qlora_cli.models.loading import compute_dtype, load_base
from qlora_cli.runs.run_folder import Weights

log = logging.getLogger("qlora")


@dataclass(frozen=True, slots=True)
class HarnessReport(Report):
    """Evaluation of one model by lm-evaluation-harness."""

    target: str
    """The run, model folder or recipe that was evaluated."""
    weights: Weights | None
    """Which weights of the run; null if nothing was trained."""
    as_chat: bool
    """Prompts went through the chat template."""
    harness: str
    """Version of lm-evaluation-harness."""
    tasks: dict[str, dict[str, float]]
    """Task, then metric, then its value."""


def evaluate_by_harness(
    target: Path,
    overrides: Sequence[str] = (),
    *,
    tasks: Sequence[str],
    task_folder: Path | None = None,
    as_chat: bool = True,
    weights: Weights = "last",
    recipe: Path | None = None,
) -> HarnessReport:
    """Run tasks of lm-evaluation-harness on a run, a model folder, or the base of a recipe.

    Args:
        tasks: task names of the harness.
        task_folder: folder with more tasks, as YAML files of the harness.
        as_chat: put prompts through the chat template, if the model has one.
        recipe: how to load a model folder.

    Raises:
        QloraError: the harness is not installed, has no such task, or the model cannot be loaded.
    """
    quiet_libraries()
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise RecipeError(
            "--harness needs the package lm-eval, which is not installed",
            hint='pip install "qlora[harness]"',
        ) from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = _task_manager(tasks, task_folder)
    evaluated = find_model(target, overrides, weights, recipe)
    settings = evaluated.recipe
    if settings.objective.head is not None:
        raise RecipeError(
            f"--harness: {target} scores rows (objective.type: {settings.objective.type}) and "
            "predicts no tokens, which the harness needs",
            hint="qlora eval without --harness measures its head",
        )
    world = World(settings.device)
    tokenizer = evaluated.load_tokenizer()
    dtype = compute_dtype(settings.quantization, settings.training.precision, world)
    model: Any = load_base(settings.model, settings.quantization, dtype, world.device)
    if evaluated.trained is not None:
        model = settings.adapter.load(model, evaluated.trained)
    # The harness counts the positions of the base, and virtual tokens take some of them.
    context = context_of(model)
    as_chat = as_chat and tokenizer.chat_template is not None
    log.info("%s: %s by lm-evaluation-harness", evaluated.name, ", ".join(tasks))
    found = lm_eval.simple_evaluate(
        HFLM(
            pretrained=model.eval(),
            tokenizer=tokenizer,
            batch_size=settings.eval_batch_size,
            max_length=context.length if context is not None and context.virtual_tokens else None,
            mixed_precision_dtype=None if dtype.itemsize == 4 else dtype,
        ),
        tasks=list(tasks),
        task_manager=manager,
        apply_chat_template=as_chat,
        limit=settings.evaluation.limit,
        log_samples=False,
    )
    return HarnessReport(
        target=str(target),
        weights=weights if evaluated.trained else None,
        as_chat=as_chat,
        harness=lm_eval.__version__,
        tasks={
            name: {key: value for key, value in one.items() if isinstance(value, float | int)}
            for name, one in found["results"].items()
        },
    )


def _task_manager(tasks: Sequence[str], folder: Path | None) -> Any:
    """Find the tasks among those of the harness and of a folder."""
    from lm_eval.tasks import TaskManager

    if folder is not None and not folder.is_dir():
        raise RecipeError(f"--harness-path: no such folder: {folder}")
    manager = TaskManager(include_path=None if folder is None else str(folder))
    if unknown := [name for name in tasks if not manager.match_tasks([name])]:
        raise RecipeError(
            f"--harness: lm-evaluation-harness has no task {', '.join(unknown)}",
            hint="list its tasks with `lm-eval ls tasks`, or add a folder of your own with "
            "--harness-path",
        )
    return manager
