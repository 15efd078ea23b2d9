"""What a tuned model lost of its base: perplexity of general text, and how far it drifted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from qlora_cli.data.config import Data
from qlora_cli.data.sources import Source
from qlora_cli.errors import DataError
from qlora_cli.tasks.loss import TokenTask, mean_per_token, perplexity
from qlora_cli.tasks.perplexity import PlainText, bos, read_texts, slide
from qlora_cli.tasks.task import Measure, Outcome, Scorer, Task, read_prompts
from qlora_cli.types import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_PROMPTS = 64
"""Most prompts on which distributions are compared: each has hundreds of them."""


class GeneralText(PlainText):
    """Text that has nothing to do with what is learnt, such as an encyclopedia."""

    window: int = Field(512, ge=16)
    """The rows are joined, and cut into pieces of so many tokens."""
    max_windows: int | None = Field(64, ge=2)
    """Read only the first pieces; null reads all."""


class Forgetting(TokenTask):
    """Perplexity of general text, in windows that do not overlap: before and after."""

    type: Literal["forgetting"] = "forgetting"
    text: GeneralText

    def measures(self) -> Sequence[Measure]:
        return [
            Measure(
                "perplexity", perplexity, lower_is_better=True, is_share=False, is_per_token=True
            )
        ]

    def questions(
        self,
        sources: Sequence[Source],
        tokenizer: PreTrainedTokenizerFast,
        settings: Data,
        *,
        limit: int | None,
    ) -> list[tuple[str, Example]]:
        """The windows, each with its number."""
        source = self.text
        text = "\n".join(text for _, text in read_texts(source, settings))
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        start = bos(tokenizer)
        windows = [one for _, one in slide(ids, source.window, source.window, start)]
        # The rest at the end is shorter, and one token alone predicts nothing.
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


class Drift(Task):
    """KL divergence of the next token from the base's, in nats, on the prompts of held-out rows."""

    type: Literal["kl"] = "kl"

    def measures(self) -> Sequence[Measure]:
        # To move away from the base is what training is for: no number is better or worse.
        return [Measure("kl", mean_per_token, lower_is_better=None, is_share=False)]

    def questions(
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

    def examine(self, model: Scorer, questions: Sequence[tuple[str, Example]]) -> list[Outcome]:
        sums = model.divergences([example for _, example in questions])
        return [
            Outcome(place, "", "", "", {"nats": nats, "tokens": len(example.input_ids)})
            for (place, example), nats in zip(questions, sums, strict=True)
        ]
