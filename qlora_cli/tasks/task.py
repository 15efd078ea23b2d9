"""The base of evaluation tasks, and the values that they exchange."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from pydantic import Field

from qlora_cli.common.config import Config
from qlora_cli.data.config import Data
from qlora_cli.data.prepared.prepare import prepare_prompts
from qlora_cli.data.sources import BadRows, Source
from qlora_cli.data.sources.row_kinds import refuse_without_answers
from qlora_cli.errors import DataError
from qlora_cli.types import Conversation, Example, ModelContext, Prompt

if TYPE_CHECKING:
    from numpy import float64
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerFast


log = logging.getLogger("qlora")


class Scorer(Protocol):
    """A model that tasks can score."""

    def generate(self, prompts: Sequence[Prompt]) -> list[str]:
        """Return the greedy answer to each prompt. Answers are cached, so tasks share them."""
        ...

    def log_likelihoods(self, examples: Sequence[Example]) -> list[float]:
        """Return the sum of log p over the supervised tokens of each example, in nats."""
        ...

    def reference_log_likelihoods(self, examples: Sequence[Example]) -> list[float]:
        """Return the same for the model that training started from; for a base, its own."""
        ...

    def head_outputs(self, examples: Sequence[Example]) -> list[list[float]]:
        """Return the outputs of a head that scores rows, for each example."""
        ...

    def divergences(self, examples: Sequence[Example]) -> list[float]:
        """Return the sum of KL(base || model) over all positions of each example, in nats."""
        ...


@dataclass(frozen=True, slots=True)
class Outcome:
    """Result of one example: the texts that a user reads, and the values that measures count."""

    place: str
    """Location of the row, such as `test.jsonl:17`."""
    prompt: str
    reference: str
    answer: str
    values: dict[str, float]
    """Input of the measures. All outcomes of a task have the same names. A name that begins with
    `_` is not shown to the user."""


Values = Mapping[str, "NDArray[float64]"]
"""Name -> values of all n examples, (..., n); leading axes are bootstrap resamples."""

TaskOutcomes = dict[str, list[Outcome]]
"""Name of a task -> outcomes of one model, in the order of the items."""


@dataclass(frozen=True, slots=True)
class Measure:
    """A number computed from all examples of a task."""

    name: str
    aggregate: Callable[[Values], NDArray[float64]]
    """Maps (..., n) to (...), so that a bootstrap can resample the examples."""
    lower_is_better: bool | None = False
    """None if neither direction is better."""
    is_share: bool = True
    """Shown as a percentage."""
    is_per_token: bool = False
    """Divided by the number of tokens, so it cannot be compared across tokenizers."""


def mean_of(name: str, *, lower_is_better: bool = False, is_share: bool = True) -> Measure:
    """Make a measure that is the mean of one value over the examples."""
    return Measure(name, lambda values: values[name].mean(-1), lower_is_better, is_share)


class Task(Config):
    """One evaluation: generate an answer to each prompt, and `score` it against the reference.

    A task that runs the model in another way overrides `read_items`, `evaluate` and `measures`.
    """

    type: str
    name: str | None = Field(None, min_length=1)
    """Name in tables, records and `--tasks`; null takes the type."""
    data: Source | None = None
    """Rows to evaluate on; null takes those of `data.evaluation`."""

    @property
    def label(self) -> str:
        """Name of the task in tables."""
        return self.name or self.type

    def score(self, reference: str, answer: str) -> float:
        """Score an answer against a reference.

        Raises:
            DataError: the reference cannot be scored against.
        """
        raise NotImplementedError

    def values(self, reference: str, answer: str) -> dict[str, float]:
        """Return the values of one answer."""
        return {self.type: self.score(reference, answer)}

    def read_items(
        self,
        sources: Sequence[Source],
        tokenizer: PreTrainedTokenizerFast,
        settings: Data,
        *,
        limit: int | None,
    ) -> Sequence[Any]:
        """Read the rows and prepare one item per example, in the order of the rows.

        Args:
            sources: the task's own `data`, or those of `data.evaluation`.
            settings: section `data` of the recipe (maximum length, handling of bad rows).
            limit: use only this many rows, from the start.

        Raises:
            DataError: there are no rows, or some cannot be used (the message counts them).
        """
        prompts = read_prompts(sources, tokenizer, settings, limit=limit)
        for prompt in prompts:
            try:
                self.values(without_empty_reasoning(prompt.reference), "")
            except DataError as error:
                raise DataError(f"{prompt.place}: {error}", hint=error.hint) from error
        return prompts

    def evaluate(self, scorer: Scorer, items: Sequence[Any]) -> list[Outcome]:
        """Run a model on all items."""
        return [
            Outcome(q.place, q.text, q.reference, answer, self._compared(q.reference, answer))
            for q, answer in zip(items, scorer.generate(items), strict=True)
        ]

    def _compared(self, reference: str, answer: str) -> dict[str, float]:
        return self.values(without_empty_reasoning(reference), without_empty_reasoning(answer))

    def place_and_length(self, item: Any) -> tuple[str, int]:
        """Return the location of an item, and the tokens that it takes of the model's context.

        A generated answer takes at least one. An item of length 0 is not compared with the context.
        """
        return (item.place, len(item.input_ids) + 1) if isinstance(item, Prompt) else ("", 0)

    def measures(self) -> Sequence[Measure]:
        """Return the measures of the task, the main one first."""
        return [mean_of(self.type)]

    def named_measures(self) -> Iterator[tuple[str, Measure]]:
        """Yield measures with their names in tables. The main measure has the name of the task."""
        for measure in self.measures():
            is_main = measure.name == self.type
            yield self.label if is_main else f"{self.label}.{measure.name}", measure


_EMPTY_REASONING = re.compile(r"\s*(<think>)?\s*</think>\s*")


def without_empty_reasoning(text: str) -> str:
    """Return an answer without the empty reasoning block that some templates begin it with.

    Such a template (Qwen3) also teaches the model to begin with that block.
    """
    found = _EMPTY_REASONING.match(text)
    return text[found.end() :] if found else text


def after_reasoning(text: str) -> str:
    """Return the part of an answer that follows its reasoning; all of it if it has none."""
    return text.rpartition("</think>")[2]


def read_rows(source: Source, settings: Data) -> list[Conversation]:
    """Read the conversations of a source.

    Raises:
        DataError: there are no rows, or some are bad (the message counts them).
    """
    refuse_without_answers(source.format, source.path)
    skip = settings.on_bad_row == "skip"
    bad = BadRows(tries_repairs=not skip)
    rows = list(source.conversations(bad))
    bad.check(source.title, skip=skip)
    return rows


def read_prompts(
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerFast,
    settings: Data,
    *,
    limit: int | None,
) -> list[Prompt]:
    """Prepare prompts from the first `limit` rows of all sources together.

    Raises:
        DataError: there are no rows, or some have no prompt (the message counts them).
    """
    skip = settings.on_bad_row == "skip"
    return [
        prompt
        for source in sources
        for prompt in prepare_prompts(source, tokenizer, skip=skip, limit=limit)
    ][:limit]


TaskItems = list[tuple[Task, Sequence[Any]]]
"""Tasks, each with its items."""


def read_tasks(
    tasks: Sequence[Task],
    data: Data,
    tokenizer: PreTrainedTokenizerFast,
    *,
    limit: int | None,
    context: ModelContext | None = None,
    max_new_tokens: int | None = None,
) -> TaskItems:
    """Read the items of each task, from its own rows or from `data.evaluation`.

    Args:
        limit: use only this many rows, from the start; None for all.
        context: that of the model, if known. An item that does not fit is treated like a training
            row: where positions are computed, it is kept with a warning; where they are a table,
            it is refused, or left out with `data.on_bad_row: skip`.
        max_new_tokens: most tokens of a generated answer; a warning counts longer references. None
            does not compare them.

    Raises:
        DataError: a row cannot be turned into an item, its reference cannot be scored, or an item
            cannot be computed.
    """
    shared = data.evaluation_sources
    found: TaskItems = [
        (
            task,
            task.read_items(
                shared if task.data is None else [data.task_source(task.data)],
                tokenizer,
                data,
                limit=limit,
            ),
        )
        for task in tasks
    ]
    if max_new_tokens is not None:
        _warn_of_long_references(found, tokenizer, max_new_tokens)
    if context is None:
        return found
    return _fit_to_context(found, context, skip=data.on_bad_row == "skip")


def _warn_of_long_references(
    found: TaskItems, tokenizer: PreTrainedTokenizerFast, max_new_tokens: int
) -> None:
    """Warn of references that are longer than a generated answer can be."""
    lengths: dict[str, int] = {}  # tasks share rows
    labels = []
    for task, items in found:
        prompts = [item for item in items if isinstance(item, Prompt)]
        if not prompts:
            continue
        encoded = tokenizer([q.reference for q in prompts], add_special_tokens=False)
        measured = {q.place: len(ids) for q, ids in zip(prompts, encoded.input_ids, strict=True)}
        lengths |= measured
        if max(measured.values()) > max_new_tokens:
            labels.append(task.label)
    if not labels:
        return
    longer = [place for place, length in lengths.items() if length > max_new_tokens]
    log.warning(
        "evaluation (%s): %s of %s references have more tokens than evaluation.max_new_tokens "
        "(%s), such as %s: an answer as long is cut off, and may be scored as wrong; the longest "
        "reference has %s",
        ", ".join(labels), f"{len(longer):,}", f"{len(lengths):,}", f"{max_new_tokens:,}",
        longer[0], f"{max(lengths.values()):,}",
    )  # fmt: skip


def _fit_to_context(found: TaskItems, context: ModelContext, *, skip: bool) -> TaskItems:
    """Warn of items that do not fit into the context, refuse them, or leave them out."""
    lengths: dict[str, int] = {}  # tasks share rows
    fitting: TaskItems = []
    for task, items in found:
        measured = [task.place_and_length(item) for item in items]
        for place, length in measured:
            lengths[place] = max(length, lengths.get(place, 0))
        pairs = zip(items, measured, strict=True)
        fitting.append((task, [item for item, (_, length) in pairs if length <= context.length]))
    beyond = [place for place, length in lengths.items() if length > context.length]
    if not beyond:
        return found
    named = ", ".join(
        task.label
        for (task, items), (_, rest) in zip(found, fitting, strict=True)
        if len(rest) < len(items)
    )
    what = (
        f"evaluation ({named}): {len(beyond):,} of {len(lengths):,} rows do not fit into the "
        f"model's context of {context.text}, such as {beyond[0]}, which takes at least "
        f"{lengths[beyond[0]]:,}"
    )
    if not context.is_table:
        log.warning("%s: the model was not trained on such positions", what)
        return found
    if skip and all(rest for _, rest in fitting):
        log.warning("%s: skipped", what)
        return fitting
    raise DataError(
        f"{what}; it has no positions for them",
        hint="shorten or remove them (windows of text: a smaller `window`)"
        + ("" if skip else ", or leave them out with data.on_bad_row: skip"),
    )
