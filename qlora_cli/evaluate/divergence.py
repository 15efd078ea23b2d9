"""Compare two models' logits on fixed texts (KL divergence, top-1 agreement)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TEXTS = (
    "The quick brown fox jumps over the lazy dog, and then it goes home.",
    "Q: A train leaves at 9:40 and arrives at 11:05. How long does the journey take?\nA:",
    "def fibonacci(n):\n    if n < 2:\n        return n\n\treturn  1234567",
    '{"name": "table", "legs": 4, "colours": ["red", "blue"]}',
    "Übermorgen fahren wir ans Meer. C'est la vie. Mañana será otro día. 明日も。 👋🏽",
)


def without_begin(tokenizer: PreTrainedTokenizerFast, text: str) -> str:
    """Remove the BOS token from a rendered conversation if tokenizing adds it again."""
    begin = tokenizer.bos_token_id
    is_added = begin is not None and tokenizer("a")["input_ids"][0] == begin
    return text.removeprefix(str(tokenizer.bos_token)) if is_added else text


@torch.no_grad()
def logits_of(model: Any, input_ids: Sequence[Sequence[int]]) -> list[Tensor]:
    """Compute float32 logits (T, V) for each row of token ids, with a model on the CPU."""
    return [
        model(input_ids=torch.tensor([row]), use_cache=False).logits[0].float() for row in input_ids
    ]


def compare(reference: Sequence[Tensor], found: Sequence[Tensor]) -> dict[str, float]:
    """Compute the mean KL(reference || found) in nats per token, and the top-1 agreement."""
    divergence, agreed, tokens = 0.0, 0, 0
    # One text at a time: the distributions of all texts together would need many times the memory.
    for expected, given in zip(reference, found, strict=True):
        p = torch.log_softmax(expected, -1)  # (T, V)
        q = torch.log_softmax(given[:, : p.shape[1]], -1)
        divergence += float((p.exp() * (p - q)).sum())
        agreed += int((p.argmax(-1) == q.argmax(-1)).sum())
        tokens += len(p)
    return {"kl": divergence / tokens, "top1_agreement": agreed / tokens}
