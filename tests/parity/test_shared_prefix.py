"""A prompt that is computed once for two answers, against one that each answer brings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qlora_cli.adapters import LoRA
from qlora_cli.data.batching.collate import concatenate_batch
from qlora_cli.kernels.attention import PerDocumentAttention
from qlora_cli.kernels.decoder_layer import fuse_layers
from qlora_cli.kernels.elementwise import Elementwise
from qlora_cli.models.base import load_model
from qlora_cli.models.packed_attention import attend_by_document
from qlora_cli.objectives.token_losses import TokenLosses, find_supervised
from qlora_cli.types import IGNORE_INDEX, Batch, Example

PROMPTS, ANSWERS = (7, 1, 0), ((5, 9), (3, 1), (2, 4))
"""Tokens of the prompt and of both answers, for each pair; without a prompt nothing is shared."""


def pairs() -> list[Example]:
    """Make pairs with random tokens."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for length, answers in zip(PROMPTS, ANSWERS, strict=True):
        prompt = torch.randint(1, 250, (length,), generator=generator).tolist()
        for at, number in enumerate(answers):
            answer = torch.randint(1, 250, (number,), generator=generator).tolist()
            labels = [IGNORE_INDEX] * length + answer
            prefix = length if at else 0
            made.append(Example(prompt + answer, labels, is_linked=at > 0, prefix=prefix))
    return made


def likelihoods(model: Any, batch: Batch) -> tuple[Tensor, list[Tensor]]:
    """Return the loss of each example, and the gradients of a weighted sum of them."""
    model.zero_grad()
    losses = TokenLosses(model, torch.float32).of_examples(batch)
    (losses * torch.arange(1, len(losses) + 1)).sum().backward()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return losses.detach(), grads


@pytest.mark.parametrize("recompute", [None, "none", "all"], ids=["plain", "fused", "recomputed"])
def test_losses_and_gradients_are_those_of_whole_documents(
    tiny_model: Path, recompute: Any
) -> None:
    base = load_model(tiny_model, dtype=torch.float32).requires_grad_(False)
    assert attend_by_document(base)
    torch.manual_seed(1)
    model = LoRA(r=4).attach(base)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    if recompute is not None:
        attention = PerDocumentAttention()
        assert fuse_layers(model, recompute, Elementwise.in_blocks(2**20), attention)
    model.train()
    apart = concatenate_batch(pairs(), 0)
    shared = concatenate_batch(pairs(), 0, shares_prefixes=True)
    assert apart.num_tokens - shared.num_tokens == sum(PROMPTS)
    assert find_supervised(shared).counts == find_supervised(apart).counts
    (wanted, grads), (found, ours) = likelihoods(model, apart), likelihoods(model, shared)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    for mine, theirs in zip(ours, grads, strict=True):
        # Rounding of float32 sums, relative to the largest gradient of the tensor.
        assert (mine - theirs).abs().max() <= 3e-6 * theirs.abs().max()
