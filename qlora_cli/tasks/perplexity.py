"""Perplexity of plain text, with as much context for each token as the window allows."""

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
from qlora_cli.tasks.loss import perplexity, token_measure
from qlora_cli.tasks.task import Measure, Outcome, Scorer, Task, Values, read_rows
from qlora_cli.types import IGNORE_INDEX, Example

if TYPE_CHECKING:
    from numpy import float64
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerFast


class PlainText(Source):
    """Rows of plain text."""

    format: FormatConfig = Text()
    """How to turn a row into text."""


class Perplexity(Task):
    """Perplexity and bits per byte of plain text, over all tokens of all documents together.

    A window slides over each document. Each token counts once, in the first window that contains
    it.
    """

    type: Literal["perplexity"] = "perplexity"
    data: PlainText
    """The text; each row is a document."""
    window: int = Field(512, ge=16)
    """Tokens of text in a window."""
    stride: int = Field(256, ge=1)
    """Tokens by which the window moves; fewer give each token more context and take longer."""
    join: bool = False
    """Join all rows into one document, as for the lines of a text file. Each window is then an
    example, also in the bootstrap intervals."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.stride >= self.window:
            raise ValueError(
                f"stride ({self.stride}) must be less than window ({self.window}): without "
                "overlap, the first token of a window has no context"
            )
        return self

    def measures(self) -> Sequence[Measure]:
        return [
            token_measure("perplexity", perplexity),
            Measure("bits_per_byte", bits_per_byte, lower_is_better=True, is_share=False),
        ]

    def read_items(
        self,
        sources: Sequence[Source],
        tokenizer: PreTrainedTokenizerFast,
        settings: Data,
        *,
        limit: int | None,
    ) -> list[Document]:
        """Prepare the documents or, if joined, the windows of the single document.

        Items without a token to count are left out before `limit` applies.
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
            raise DataError(f"{self.data.path}: no text has two tokens or more")
        return found

    def place_and_length(self, item: Document) -> tuple[str, int]:
        return item.place, max(len(window.example.input_ids) for window in item.windows)

    def evaluate(self, scorer: Scorer, items: Sequence[Document]) -> list[Outcome]:
        sums = iter(scorer.log_likelihoods([w.example for q in items for w in q.windows]))
        outcomes = []
        for item in items:
            nats = -sum(next(sums) for _ in item.windows)
            num_bytes = sum(window.num_bytes for window in item.windows)
            values = {"nats": nats, "tokens": item.num_tokens, "bytes": num_bytes}
            outcomes.append(Outcome(item.place, "", "", "", values))
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
    """Tokens for one forward pass; the supervised ones count."""

    example: Example
    num_bytes: int
    """Bytes of the text that counts."""


@dataclass(frozen=True, slots=True)
class Document:
    """Windows that form one example."""

    place: str
    windows: list[Window]

    @property
    def num_tokens(self) -> int:
        """Number of tokens that count."""
        return sum(window.example.num_supervised for window in self.windows)


def bits_per_byte(values: Values) -> NDArray[float64]:
    """Divide bits by bytes, each summed over the examples first. Comparable across tokenizers."""
    bits: NDArray[float64] = values["nats"].sum(-1) / values["bytes"].sum(-1) / math.log(2)
    return bits


def read_texts(source: Source, settings: Data) -> list[tuple[str, str]]:
    """Read the texts of a source, each with the location of its row.

    Raises:
        DataError: there are no rows, or some are bad (the message counts them).
    """
    return [
        (row.place, "".join(message.content for message in row.messages))
        for row in read_rows(source, settings)
    ]


def bos(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Return the BOS token, which starts each window, if the tokenizer has one."""
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]


def slide(
    ids: list[int], window: int, stride: int, start: list[int]
) -> Iterator[tuple[int, Example]]:
    """Slide a window over tokens. Yield the end of each window and its tokens.

    The tokens that no earlier window contains are supervised.

    Args:
        start: tokens before each window.
    """
    done = 0
    while done < len(ids):
        stop = min(done + stride, len(ids)) if done else min(window, len(ids))
        first = max(0, stop - window)
        hidden = [IGNORE_INDEX] * (len(start) + done - first)
        yield stop, Example([*start, *ids[first:stop]], [*hidden, *ids[done:stop]])
        done = stop
