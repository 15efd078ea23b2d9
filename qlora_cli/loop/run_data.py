"""Read the training and evaluation data of a run, before any model is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from qlora_cli.data.prepared.audit import check_data
from qlora_cli.data.prepared.cache import read_data
from qlora_cli.data.prepared.prepare import PreparedData
from qlora_cli.data.render.chat_template import read_chat_template
from qlora_cli.errors import DataError
from qlora_cli.models.identity import identify
from qlora_cli.models.tokenizer import choose_pad_token
from qlora_cli.models.tokenizer_check import require_as_in_file
from qlora_cli.models.vocabulary import embedding_rows
from qlora_cli.recipe.schema import Recipe
from qlora_cli.runs.resume_check import take_fingerprint
from qlora_cli.tasks.task import TaskItems, read_tasks
from qlora_cli.types import ModelContext

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


_COMPARED = 64
"""Rows whose tokens are compared with those of the tokenizer's file."""


@dataclass(frozen=True)
class RecipeData:
    """The training and evaluation rows of a recipe, as tokens."""

    tokenizer: PreTrainedTokenizerFast
    training: PreparedData
    evaluation: PreparedData | None
    context: ModelContext | None
    """The positions that the model was made for, if its config says so."""

    @property
    def longest(self) -> int:
        """Tokens of the longest training or evaluation row."""
        sides = [self.training, *([self.evaluation] if self.evaluation else [])]
        return max(side.longest for side in sides)


@dataclass(frozen=True)
class RunData(RecipeData):
    """Everything that a run reads, checked."""

    tasks: TaskItems
    """The tasks to run during training, with their items."""
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
    data.require_rows(recipe.objective)
    tokenizer = recipe.model.load_tokenizer(read_chat_template(data.chat_template))
    context = recipe.model.read_context(recipe.adapter.virtual_tokens)
    read = partial(read_data, use_cache=use_cache, context=context, objective=recipe.objective)
    training = read("training", data, data.train_sources, tokenizer)
    evaluation = None
    if sources := data.evaluation_sources:
        evaluation = read("evaluation", data, sources, tokenizer)
    prepared = [training, *([evaluation] if evaluation else [])]
    check_tokens(recipe, tokenizer, prepared)
    if recipe.objective.head is not None:
        choose_pad_token(
            tokenizer, {token for one in prepared for token in one.examples.last_tokens()}
        )
    return RecipeData(tokenizer, training, evaluation, context)


def check_tokens(
    recipe: Recipe, tokenizer: PreTrainedTokenizerFast, prepared: Sequence[PreparedData]
) -> None:
    """Refuse rows with tokens that the model's embedding or the tokenizer's file does not have.

    `load_tokenizer` checks the tokenizer itself. Plain text may still contain a special token that
    no template writes and that has no row in the embedding.

    Raises:
        DataError: a row has a token without a row in the embedding.
        ModelError: the tokenizer's own file gives other tokens for one of the first rows.
    """
    model = recipe.model
    folder = model.locate()
    rows = embedding_rows(folder, trust_remote_code=model.trust_remote_code)
    for one in prepared:
        texts = (str(tokenizer.decode(example.input_ids)) for example in one.examples[:_COMPARED])
        require_as_in_file(tokenizer, folder, texts)
        if rows is None:
            continue
        if found := one.examples.first_with_token_from(rows):
            index, token_id = found
            raise DataError(
                f"{one.examples.place(index)}: the row has token {token_id}, and the model's "
                f"embedding has {rows} rows (0 to {rows - 1})",
                hint="remove the special token from the text, or use the tokenizer that belongs "
                "to this model",
            )


def prepare_data(recipe: Recipe, *, use_cache: bool = True) -> RunData:
    """Read, tokenize and audit all rows, and the items of all tasks.

    A bad row is found here, before a large model is loaded.

    Raises:
        QloraError: the tokenizer or a row cannot be used, or a limit of `data.audit` is crossed.
    """
    rows = read_recipe_data(recipe, use_cache=use_cache)
    evaluation = recipe.evaluation
    tasks = read_tasks(
        evaluation.tasks,
        recipe.data,
        rows.tokenizer,
        limit=evaluation.limit,
        context=rows.context,
        max_new_tokens=evaluation.max_new_tokens,
    )
    audit = check_data(
        recipe.data,
        rows.training,
        rows.evaluation,
        rows.tokenizer,
        context=rows.context,
        objective=recipe.objective,
    )
    base = identify(recipe.model.locate())
    fingerprint = take_fingerprint(base, rows.tokenizer, rows.training, rows.evaluation)
    return RunData(**vars(rows), tasks=tasks, audit=audit, base=base, fingerprint=fingerprint)
