"""How likely a model finds plain text, each token with as much of what precedes it as fits."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from qlora_cli.data.config import Data
from qlora_cli.data.formats import FormatConfig, Text
from qlora_cli.data.sources import Source
from qlora_cli.errors import DataError
from qlora_cli.tasks.loss import perplexity
from qlora_cli.tasks.task import Measure, Outcome, Scorer, Task, Values, read_rows
from qlora_cli.types import IGNORE_INDEX, Example

if TYPE_CHECKING:
    from numpy import float64
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerFast


class PlainText(Source):
    """Rows of plain text."""

    format: FormatConfig = Text()
    """How a row becomes text."""


class Perplexity(Task):
    """Perplexity of plain text, over all tokens of all documents together, and bits per byte.

    A window slides over each document, and each token is counted once, in the first window that
    reaches it.
    """

    type: Literal["perplexity"] = "perplexity"
    data: PlainText
    """The text; a row is a document."""
    window: int = Field(512, ge=16)
    """Tokens of text that the model sees at once."""
    stride: int = Field(256, ge=1)
    """Tokens that the window moves on; less gives more context, and takes longer."""
    join: bool = False
    """All rows are one document, such as the lines of a text file. What is counted, and drawn for
    intervals, is then what each window adds."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.stride >= self.window:
            raise ValueError(
                f"stride ({self.stride}) must be less than window ({self.window}): the first token "
                "of a window that overlaps no other has nothing before it"
            )
        return self

    def measures(self) -> Sequence[Measure]:
        return [
            Measure(
                "perplexity", perplexity, lower_is_better=True, is_share=False, is_per_token=True
            ),
            Measure("bits_per_byte", bits_per_byte, lower_is_better=True, is_share=False),
        ]

    def questions(
        self,
        sources: Sequence[Source],
        tokenizer: PreTrainedTokenizerFast,
        settings: Data,
        *,
        limit: int | None,
    ) -> list[Document]:
        """The documents, or, joined, the windows of the one; each has at least one token to count.

        `limit` takes the first of them.
        """
        rows = read_texts(self.data, settings)
        if self.join:
            text = "\n".join(text for _, text in rows)
            windows = self._windows(text, tokenizer)
            path = self.data.path
            found = [Document(f"{path}, window {i}", [one]) for i, one in enumerate(windows, 1)]
        else:
            found = [Document(place, self._windows(text, tokenizer)) for place, text in rows]
        found = [one for one in found if one.num_tokens][:limit]
        if not found:
            raise DataError(f"{self.data.path}: no text of two tokens or more")
        return found

    def examine(self, model: Scorer, questions: Sequence[Document]) -> list[Outcome]:
        sums = iter(model.log_likelihoods([w.example for q in questions for w in q.windows]))
        outcomes = []
        for question in questions:
            nats = -sum(next(sums) for _ in question.windows)
            num_bytes = sum(window.num_bytes for window in question.windows)
            values = {"nats": nats, "tokens": question.num_tokens, "bytes": num_bytes}
            outcomes.append(Outcome(question.place, "", "", "", values))
        return outcomes

    def _windows(self, text: str, tokenizer: PreTrainedTokenizerFast) -> list[Window]:
        encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ends, start, found = encoding["offset_mapping"], bos(tokenizer), []
        done = 0
        for stop, example in slide(encoding["input_ids"], self.window, self.stride, start):
            end = ends[stop - 1][1]
            found.append(Window(example, len(text[done:end].encode())))
            done = end
        return found


@dataclass(frozen=True, slots=True)
class Window:
    """What the model is given at once."""

    example: Example
    num_bytes: int
    """Of the text that is counted in it."""


@dataclass(frozen=True, slots=True)
class Document:
    """Windows that are counted together."""

    place: str
    windows: list[Window]

    @property
    def num_tokens(self) -> int:
        """Tokens that are counted."""
        return sum(window.example.num_supervised for window in self.windows)


def bits_per_byte(values: Values) -> NDArray[float64]:
    """Nats over bytes, both summed over the examples first, as bits: whatever the tokenizer."""
    bits: NDArray[float64] = values["nats"].sum(-1) / values["bytes"].sum(-1) / math.log(2)
    return bits


def read_texts(source: Source, settings: Data) -> list[tuple[str, str]]:
    """The texts of a source, each with its place.

    Raises:
        DataError: no rows, or bad rows (all are counted).
    """
    return [
        (row.place, "".join(message.content for message in row.messages))
        for row in read_rows(source, settings)
    ]


def bos(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """What each window begins with: the BOS, where the tokenizer has one."""
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]


def slide(
    ids: list[int], window: int, stride: int, start: list[int]
) -> Iterator[tuple[int, Example]]:
    """Windows over tokens: where each ends, and the tokens, of which those are supervised that no
    window before it had.

    Args:
        start: what is put before each window.
    """
    done = 0
    while done < len(ids):
        stop = min(done + stride, len(ids)) if done else min(window, len(ids))
        first = max(0, stop - window)
        hidden = [IGNORE_INDEX] * (len(start) + done - first)
        yield stop, Example([*start, *ids[first:stop]], [*hidden, *ids[done:stop]])
        done = stop
