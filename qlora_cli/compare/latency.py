"""Measure generation speed: one prompt, greedy, a fixed number of tokens."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from qlora_cli.compare.report import Latency
from qlora_cli.evaluate.divergence import TEXTS
from qlora_cli.inference.sampling import Sampling, TextGenerator
from qlora_cli.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PROMPT_TOKENS = 64
NEW_TOKENS = 32
REPEATS = 5

_NEVER = (2**40,)
"""A stop token outside of every vocabulary. Without one, the model's own stop tokens apply."""


def measure_latency(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    *,
    dtype: torch.dtype,
    device: torch.device,
    new_tokens: int = NEW_TOKENS,
    repeats: int = REPEATS,
) -> Latency:
    """Measure the time to the first token, and the tokens per second after it, for one prompt.

    Both are medians of several runs, after one warm-up run. No token stops generation, so every run
    has the same number of tokens.
    """

    def seconds(number: int) -> float:
        started = time.perf_counter()
        list(generator.complete([prompt], Sampling(max_new_tokens=number), batch_size=1))
        return time.perf_counter() - started

    generator = TextGenerator(model, tokenizer, _NEVER, dtype, device)
    prompt = Prompt(prompt_ids(tokenizer), reference="")
    seconds(new_tokens)
    pairs = [(seconds(1), seconds(new_tokens)) for _ in range(repeats)]
    # The clock may not advance between two reads.
    rest = max(median(whole - one for one, whole in pairs), 1e-9)
    return Latency(median(one for one, _ in pairs), (new_tokens - 1) / rest)


def prompt_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Return `PROMPT_TOKENS` tokens of ordinary text, the same for every model of a tokenizer."""
    ids: Sequence[int] = tokenizer(" ".join(TEXTS), add_special_tokens=False)["input_ids"]
    return (list(ids) * PROMPT_TOKENS)[:PROMPT_TOKENS]
