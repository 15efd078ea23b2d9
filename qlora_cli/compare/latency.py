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
from qlora_cli.types import ModelContext, Prompt

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
    context: ModelContext | None = None,
    repeats: int = REPEATS,
) -> Latency:
    """Measure the time to the first token, and the tokens per second after it, for one prompt.

    Both are medians of several runs, after one warm-up run. No token stops generation, so every run
    has the same number of tokens.

    Args:
        context: that of the model, if known. In a short one, prompt and answer are shorter.
    """
    prompt_tokens, new_tokens = _lengths(context)
    if prompt_tokens < 1:
        assert context is not None
        return Latency(error=f"the model's context of {context.text} is too short to generate in")

    def seconds(number: int) -> float:
        started = time.perf_counter()
        list(generator.complete([prompt], Sampling(max_new_tokens=number), batch_size=1))
        return time.perf_counter() - started

    generator = TextGenerator(model, tokenizer, _NEVER, dtype, device)
    prompt = Prompt(prompt_ids(tokenizer)[:prompt_tokens], reference="")
    seconds(new_tokens)
    pairs = [(seconds(1), seconds(new_tokens)) for _ in range(repeats)]
    # The clock may not advance between two reads.
    rest = max(median(whole - one for one, whole in pairs), 1e-9)
    return Latency(median(one for one, _ in pairs), (new_tokens - 1) / rest)


def _lengths(context: ModelContext | None) -> tuple[int, int]:
    """Return the number of prompt tokens and of new tokens, at least two, that fit the context."""
    room = PROMPT_TOKENS + NEW_TOKENS
    if context is not None:
        room = min(room, context.length)
    new_tokens = max(2, min(NEW_TOKENS, room // 3))
    return min(PROMPT_TOKENS, room - new_tokens), new_tokens


def prompt_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Return `PROMPT_TOKENS` tokens of ordinary text, the same for every model of a tokenizer."""
    ids: Sequence[int] = tokenizer(" ".join(TEXTS), add_special_tokens=False)["input_ids"]
    return (list(ids) * PROMPT_TOKENS)[:PROMPT_TOKENS]
