"""Read everything that a run learns from and is evaluated on, before any model is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlora_cli.data.prepared.audit import check_data
from qlora_cli.data.prepared.cache import read_data
from qlora_cli.data.prepared.prepare import PreparedData
from qlora_cli.data.render.chat_template import read_chat_template
from qlora_cli.models.identity import identify
from qlora_cli.recipe.schema import Recipe
from qlora_cli.runs.resume_check import take_fingerprint
from qlora_cli.tasks.task import TaskItems, read_tasks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class RecipeData:
    """The training and evaluation rows of a recipe, as tokens."""

    tokenizer: PreTrainedTokenizerFast
    training: PreparedData
    evaluation: PreparedData | None


@dataclass(frozen=True)
class RunData(RecipeData):
    """Everything that a run reads, checked."""

    tasks: TaskItems
    """The tasks that are asked during training, with their questions."""
    audit: dict[str, dict[str, Any]]
    """Figures about the training and the evaluation rows, for the record."""
    base: Mapping[str, str]
    """Identity of the base model."""
    fingerprint: Mapping[str, str | None]
    """Digests of all that the run reads."""


def read_recipe_data(recipe: Recipe, *, use_cache: bool = True) -> RecipeData:
    """Read and tokenize the training and the evaluation rows.

    Args:
        use_cache: keep the tokens, and reuse those that were kept before.

    Raises:
        QloraError: the tokenizer or a row cannot be used.
    """
    data = recipe.data
    tokenizer = recipe.model.load_tokenizer(read_chat_template(data.chat_template))
    training = read_data("training", data, data.train_sources, tokenizer, use_cache=use_cache)
    evaluation = None
    if sources := data.evaluation_sources:
        evaluation = read_data("evaluation", data, sources, tokenizer, use_cache=use_cache)
    return RecipeData(tokenizer, training, evaluation)


def prepare_data(recipe: Recipe, *, use_cache: bool = True) -> RunData:
    """Read, tokenize and audit all rows, and the questions of all tasks.

    A bad row is found here, before a large model is loaded.

    Raises:
        QloraError: the tokenizer or a row cannot be used, or a limit of `data.audit` is crossed.
    """
    rows = read_recipe_data(recipe, use_cache=use_cache)
    evaluation = recipe.evaluation
    tasks = read_tasks(evaluation.tasks, recipe.data, rows.tokenizer, limit=evaluation.limit)
    audit = check_data(recipe.data, rows.training, rows.evaluation, rows.tokenizer)
    base = identify(recipe.model.locate())
    fingerprint = take_fingerprint(base, rows.tokenizer, rows.training, rows.evaluation)
    return RunData(rows.tokenizer, rows.training, rows.evaluation, tasks, audit, base, fingerprint)
