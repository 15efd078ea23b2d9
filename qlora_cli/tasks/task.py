"""What all evaluation tasks share: what is asked, of which rows, and how answers are counted."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from pydantic import Field

from qlora_cli.common.config import Config
from qlora_cli.data.config import Data
from qlora_cli.data.prepared.prepare import prepare_prompts
from qlora_cli.data.sources import BadRows, Source
from qlora_cli.errors import DataError
from qlora_cli.types import Conversation, Example, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

if TYPE_CHECKING:
    from numpy import float64
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerFast


class Scorer(Protocol):
    """A model under examination."""

    def write(self, prompts: Sequence[Prompt]) -> list[str]:
        """The greedy answer to each prompt. It is remembered, so that tasks share answers."""
        ...

    def log_likelihoods(self, examples: Sequence[Example]) -> list[float]:
        """For each example, the sum of log p over its supervised tokens, in nats."""
        ...

    def divergences(self, examples: Sequence[Example]) -> list[float]:
        """For each example, the sum over all positions of KL(base || model), in nats."""
        ...


@dataclass(frozen=True, slots=True)
class Outcome:
    """One example after it was asked: what a user looks at, and what is counted."""

    place: str
    """Of the row: `test.jsonl:17`."""
    prompt: str
    reference: str
    answer: str
    values: dict[str, float]
    """What a `Measure` is made of. All outcomes of a task have the same names; one that begins
    with `_` is for counting alone, and not shown."""


Values = Mapping[str, "NDArray[float64]"]
"""Name -> the values of all examples, (..., n): leading axes are resamples."""


@dataclass(frozen=True, slots=True)
class Measure:
    """A figure for all examples together."""

    name: str
    aggregate: Callable[[Values], NDArray[float64]]
    """From (..., n) to (...), so that a bootstrap can resample the examples."""
    lower_is_better: bool | None = False
    """None: neither is."""
    is_share: bool = True
    """Shown as a percentage."""
    is_per_token: bool = False
    """Over `tokens` of the model's own: another thing for each tokenizer."""


def mean_of(name: str, *, lower_is_better: bool = False, is_share: bool = True) -> Measure:
    """The mean of one value over the examples."""
    return Measure(name, lambda values: values[name].mean(-1), lower_is_better, is_share)


class Task(Config):
    """One evaluation. A kind of its own says what it asks, how, and what it counts."""

    type: str
    name: str | None = Field(None, min_length=1)
    """What it is called in tables, in records and by `--tasks`; null takes the type."""
    data: Source | None = None
    """Rows to ask about; null takes those of `data.evaluation`."""

    @property
    def label(self) -> str:
        """Its name."""
        return self.name or self.type

    @abstractmethod
    def questions(
        self,
        sources: Sequence[Source],
        tokenizer: PreTrainedTokenizerFast,
        settings: Data,
        *,
        limit: int | None,
    ) -> Sequence[Any]:
        """What is asked, one for each example, in the order of the rows.

        Args:
            sources: `data`, or what `data.evaluation` names.
            settings: the recipe's section `data`: how long rows may be, what becomes of bad ones.
            limit: ask about the first rows alone.

        Raises:
            DataError: no rows, or rows that cannot be asked about (all are counted).
        """

    @abstractmethod
    def examine(self, model: Scorer, questions: Sequence[Any]) -> list[Outcome]:
        """Ask a model all questions."""

    @abstractmethod
    def measures(self) -> Sequence[Measure]:
        """What the outcomes come to. The first is what the task is known by."""

    def named_measures(self) -> Iterator[tuple[str, Measure]]:
        """The measures by their names in tables; one of the task's type has the task's own name."""
        for measure in self.measures():
            is_main = measure.name == self.type
            yield self.label if is_main else f"{self.label}.{measure.name}", measure


def read_rows(source: Source, settings: Data) -> list[Conversation]:
    """What the rows of a source say.

    Raises:
        DataError: no rows, or bad rows (all are counted).
    """
    bad = BadRows()
    rows = list(source.conversations(bad))
    bad.check(source.path, skip=settings.on_bad_row == "skip")
    return rows


def read_prompts(
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerFast,
    settings: Data,
    *,
    limit: int | None,
) -> list[Prompt]:
    """The prompts of the first rows of all sources together.

    Raises:
        DataError: no rows, or rows that cannot be asked about (all are counted).
    """
    skip = settings.on_bad_row == "skip"
    return [
        prompt
        for source in sources
        for prompt in prepare_prompts(source, tokenizer, skip=skip, limit=limit)
    ][:limit]


class WrittenTask(Task):
    """A task that scores text which the model writes, on prompts made of rows as in training."""

    @abstractmethod
    def score(self, reference: str, answer: str) -> float:
        """How good an answer is.

        Raises:
            DataError: no answer can be scored against this reference.
        """

    def values(self, reference: str, answer: str) -> dict[str, float]:
        """What is counted of one answer."""
        return {self.type: self.score(reference, answer)}

    def measures(self) -> Sequence[Measure]:
        return [mean_of(self.type)]

    def questions(
        self,
        sources: Sequence[Source],
        tokenizer: PreTrainedTokenizerFast,
        settings: Data,
        *,
        limit: int | None,
    ) -> list[Prompt]:
        prompts = read_prompts(sources, tokenizer, settings, limit=limit)
        for prompt in prompts:
            try:
                self.values(prompt.reference, "")
            except DataError as error:
                raise DataError(f"{prompt.place}: {error}", hint=error.hint) from error
        return prompts

    def examine(self, model: Scorer, questions: Sequence[Prompt]) -> list[Outcome]:
        return [
            Outcome(q.place, q.text, q.reference, answer, self.values(q.reference, answer))
            for q, answer in zip(questions, model.write(questions), strict=True)
        ]


TaskPrompts = list[tuple[Task, Sequence[Any]]]
"""Tasks, each with its questions."""


def read_tasks(
    tasks: Sequence[Task], data: Data, tokenizer: PreTrainedTokenizerFast, *, limit: int | None
) -> TaskPrompts:
    """Read the questions of each task, from its own rows or from `data.evaluation`.

    Args:
        limit: use only the first rows; None for all.

    Raises:
        DataError: a row cannot be turned into a question, or its reference cannot be scored.
    """
    shared = data.evaluation_sources
    return [
        (
            task,
            task.questions(
                shared if task.data is None else [task.data], tokenizer, data, limit=limit
            ),
        )
        for task in tasks
    ]
