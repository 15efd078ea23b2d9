"""Hands a model to lm-evaluation-harness: as it was trained, with its tokenizer and template."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qlora_cli._compat import quiet_libraries
from qlora_cli.distributed.world import World
from qlora_cli.errors import RecipeError
from qlora_cli.evaluate.evaluate import find_subject
from qlora_cli.models.loading import compute_dtype, load_base
from qlora_cli.runs.run_folder import Weights

log = logging.getLogger("qlora")


def evaluate_by_harness(
    target: Path,
    overrides: Sequence[str] = (),
    *,
    tasks: Sequence[str],
    task_folder: Path | None = None,
    as_chat: bool = True,
    weights: Weights = "last",
    recipe: Path | None = None,
) -> dict[str, Any]:
    """Measure a run, a model folder, or the base of a recipe, by tasks of lm-evaluation-harness.

    Args:
        tasks: their names, as the harness has them.
        task_folder: with tasks (YAML files) of the user's own.
        as_chat: put the prompts through the chat template, where there is one.
        recipe: how a model folder is loaded.

    Returns:
        {"target", "weights", "as_chat", "harness": its version, "tasks": {name: {metric: value}}}.

    Raises:
        QloraError: in one of its kinds, with its exit code.
    """
    quiet_libraries()
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise RecipeError(
            "--harness needs the package lm-eval, which is not installed",
            hint='pip install "qlora[harness]"',
        ) from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if task_folder is not None and not task_folder.is_dir():
        raise RecipeError(f"--harness-path: no such folder: {task_folder}")
    manager = TaskManager(include_path=None if task_folder is None else str(task_folder))
    if unknown := [name for name in tasks if not manager.match_tasks([name])]:
        raise RecipeError(
            f"--harness: lm-evaluation-harness has no task {', '.join(unknown)}",
            hint="--harness-path names a folder with tasks of your own; `lm-eval ls tasks` shows "
            "those that there are",
        )
    subject = find_subject(target, overrides, weights, recipe)
    settings, world = subject.recipe, World()
    tokenizer = subject.load_tokenizer()
    dtype = compute_dtype(settings.quantization, settings.training.precision, world)
    model: Any = load_base(settings.model, settings.quantization, dtype, world.device)
    if subject.trained is not None:
        model = settings.adapter.load(model, subject.trained)
    as_chat = as_chat and tokenizer.chat_template is not None
    log.info("%s: %s by lm-evaluation-harness", subject.name, ", ".join(tasks))
    found = lm_eval.simple_evaluate(
        HFLM(
            pretrained=model.eval(),
            tokenizer=tokenizer,
            batch_size=settings.eval_batch_size,
            mixed_precision_dtype=None if dtype.itemsize == 4 else dtype,
        ),
        tasks=list(tasks),
        task_manager=manager,
        apply_chat_template=as_chat,
        limit=settings.evaluation.limit,
        log_samples=False,
    )
    return {
        "target": str(target),
        "weights": weights if subject.trained else None,
        "as_chat": as_chat,
        "harness": lm_eval.__version__,
        "tasks": {
            name: {key: value for key, value in one.items() if isinstance(value, float | int)}
            for name, one in found["results"].items()
        },
    }
