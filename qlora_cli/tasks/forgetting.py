"""Forgetting: perplexity of general text, and divergence from the base."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from qlora_cli.data.config import Data
from qlora_cli.data.formats import FormatConfig, Text
from qlora_cli.data.sources import Source
from qlora_cli.errors import DataError
from qlora_cli.tasks.loss import evaluate_tokens, mean_per_token, perplexity, token_measure
from qlora_cli.tasks.perplexity import bos, read_texts, slide
from qlora_cli.tasks.task import Measure, Outcome, Scorer, Task, read_prompts
from qlora_cli.types import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_PROMPTS = 64
"""Maximum number of prompts to compare; each has hundreds of positions."""


class GeneralText(Source):
    """Text unrelated to the training data, such as an encyclopedia."""

    format: FormatConfig = Text()
    """How to turn a row into text."""
    window: int = Field(512, ge=16)
    """Tokens per window; the rows are joined and cut into windows."""
    max_windows: int | None = Field(64, ge=2)
    """Maximum number of windows; null reads all."""


class Forgetting(Task):
    """Perplexity of general text, in windows that do not overlap."""

    type: Literal["forgetting"] = "forgetting"
    text: GeneralText

    def measures(self) -> Sequence[Measure]:
        return [token_measure("perplexity", perplexity)]

    def read_items(
        self,
        sources: Sequence[Source],
        tokenizer: PreTrainedTokenizerFast,
        settings: Data,
        *,
        limit: int | None,
    ) -> list[tuple[str, Example]]:
        """Cut the text into windows, each with its number."""
        source = self.text
        text = "\n".join(text for _, text in read_texts(source, settings))
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        start = bos(tokenizer)
        windows = [one for _, one in slide(ids, source.window, source.window, start)]
        # Drop the shorter rest at the end; a single token would have nothing to predict.
        length = source.window + len(start)
        whole = [window for window in windows if len(window.input_ids) == length]
        if len(whole) < 2:
            raise DataError(
                f"evaluation.forgetting: {source.path} has {len(ids):,} tokens, which is less than "
                f"two windows of {source.window}",
                hint="give more text, or a smaller evaluation.forgetting.window",
            )
        return [
            (f"{source.path}, window {number}", window)
            for number, window in enumerate(whole[: source.max_windows], start=1)
        ]

    def place_and_length(self, item: tuple[str, Example]) -> tuple[str, int]:
        place, example = item
        return place, len(example.input_ids)

    def evaluate(self, scorer: Scorer, items: Sequence[tuple[str, Example]]) -> list[Outcome]:
        return evaluate_tokens(scorer, items)


class Divergence(Task):
    """KL divergence of the next-token distribution from the base's, on held-out prompts."""

    type: Literal["kl"] = "kl"

    def measures(self) -> Sequence[Measure]:
        # Training is meant to move the model away from its base, so neither direction is better.
        return [Measure("kl", mean_per_token, lower_is_better=None, is_share=False)]

    def read_items(
        self,
        sources: Sequence[Source],
        tokenizer: PreTrainedTokenizerFast,
        settings: Data,
        *,
        limit: int | None,
    ) -> list[tuple[str, Example]]:
        most = min(limit or _PROMPTS, _PROMPTS)
        prompts = read_prompts(sources, tokenizer, settings, limit=most)
        return [(prompt.place, Example(prompt.input_ids, prompt.input_ids)) for prompt in prompts]

    def place_and_length(self, item: tuple[str, Example]) -> tuple[str, int]:
        place, example = item
        return place, len(example.input_ids)

    def evaluate(self, scorer: Scorer, items: Sequence[tuple[str, Example]]) -> list[Outcome]:
        sums = scorer.divergences([example for _, example in items])
        return [
            Outcome(place, "", "", "", {"nats": nats, "tokens": len(example.input_ids)})
            for (place, example), nats in zip(items, sums, strict=True)
        ]
