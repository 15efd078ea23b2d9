"""Values that a preview shows, ready to be formatted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from qlora_cli.data.prepared.findings import Finding
from qlora_cli.data.prepared.statistics import DatasetStatistics, RowStatistics
from qlora_cli.types import IGNORE_INDEX, Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True, slots=True)
class TextSpan:
    """Neighbouring tokens of one kind, as text. Each special token is its own span."""

    text: str
    is_supervised: bool
    is_special: bool
    is_parting: bool = False
    """The first span of an answer that the other answer of its pair does not have."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A row to show."""

    place: str
    num_tokens: int
    num_supervised: int
    spans: list[TextSpan]
    answer: str | None = None
    """The answer of a pair: `chosen` or `rejected`."""
    label: str | None = None
    """The label that the objective learns from."""

    @property
    def description(self) -> str:
        """The answer and the label, to follow the place; "" without either."""
        label = None if self.label is None else f"label {self.label}"
        return "".join(f", {one}" for one in (self.answer, label) if one is not None)


@dataclass(frozen=True, slots=True)
class SourceView:
    """A source and its first rows."""

    name: str
    """Its key in section `data` of the recipe: `train`, or `train.0` in a list."""
    path: str
    num_read: int
    """Rows that could be read."""
    num_bad: int
    """Rows that could not be used."""
    num_swallowed: int
    """Further lines that became part of these rows, because a quotation mark was not closed."""
    num_dropped: int
    """Rows without supervised tokens."""
    num_cut: int
    """Rows longer than `data.max_length`, including the dropped ones."""
    repaired: str
    """Repairs, with the number of rows that each changed."""
    ignored: str
    """Keys of messages that are not read, with their counts."""
    figures: RowStatistics
    samples: list[Sample]


@dataclass(frozen=True, slots=True)
class SplitView:
    """The training or the evaluation data."""

    name: str
    audit: DatasetStatistics
    stops: list[tuple[str, int]]
    """Tokens that end supervised turns, and the number of turns that each ends."""
    findings: list[Finding]
    sources: list[SourceView]
    has_answers: bool = True
    """The rows have supervised turns, and not a label in their place."""


def make_sample(
    example: Example,
    place: str,
    tokenizer: PreTrainedTokenizerFast,
    *,
    answer: str | None = None,
    num_shared: int | None = None,
    label: str | None = None,
) -> Sample:
    """Split a row into spans.

    Args:
        num_shared: in a pair, tokens at the beginning that both answers have.
    """
    return Sample(
        place=place,
        num_tokens=len(example.input_ids),
        num_supervised=example.num_supervised,
        spans=_spans(example, tokenizer, num_shared),
        answer=answer,
        label=label,
    )


def num_shared(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the number of tokens at the beginning of both."""
    pairs = zip(one, other, strict=False)
    differing = (i for i, (a, b) in enumerate(pairs) if a != b)
    return next(differing, min(len(one), len(other)))


def _spans(
    example: Example, tokenizer: PreTrainedTokenizerFast, parting: int | None
) -> list[TextSpan]:
    added = tokenizer.added_tokens_decoder
    ids = example.input_ids

    def kind(i: int) -> tuple[bool, int | None, bool]:
        special = i if ids[i] in added else None
        return example.labels[i] != IGNORE_INDEX, special, parting is not None and i >= parting

    spans = []
    for (is_supervised, special, _), group in groupby(range(len(ids)), kind):
        places = list(group)
        text = _decode(ids, places[0], places[-1] + 1, tokenizer)
        spans.append(TextSpan(text, is_supervised, special is not None, places[0] == parting))
    return spans


def _decode(ids: list[int], first: int, after: int, tokenizer: PreTrainedTokenizerFast) -> str:
    """Decode some tokens of a row.

    Some tokenizers drop the space before the first token, so decode the previous token too and
    remove its text.
    """

    def decode(start: int, end: int) -> str:
        text = tokenizer.decode(ids[start:end], clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    before = max(0, first - 1)
    lead, whole = decode(before, first), decode(before, after)
    return whole[len(lead) :] if whole.startswith(lead) else decode(first, after)
