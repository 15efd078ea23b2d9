"""Put examples and prompts into padded or packed batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qlora_cli.types import IGNORE_INDEX, Batch, Example, Prompt

if TYPE_CHECKING:
    from torch import Tensor


_PROOF_TOKENS = 64
"""Of each example that packing is proved on."""


def full_batch(num_rows: int, max_length: int, *, padding_free: bool) -> Batch:
    """As large a batch as there can be, everything in it learnt: what stands in for data.

    The last of several rows is a token shorter, as rows hardly ever are of one length; so the batch
    has a mask, unless they lie end to end.
    """
    sizes = [max_length] * (num_rows - 1) + [max_length - (num_rows > 1)]
    examples = [Example([1] * size, [1] * size) for size in sizes]
    return (concatenate_batch if padding_free else pad_batch)(examples, 0)


def proof_batches(examples: Sequence[Example], *, pad_token_id: int) -> tuple[Batch, Batch]:
    """Tokens of three examples, packed and padded: to see whether a model tells them apart.

    Of one length, a short example many times over, so that none is padded: with LLM.int8() the
    tokens of a batch decide together how it is computed, and these are the same tokens in both.
    The labels say nothing.
    """
    some = [examples[i % len(examples)].input_ids for i in range(3)]
    pieces = [(ids * _PROOF_TOKENS)[:_PROOF_TOKENS] for ids in some]
    made = [Example(ids, [IGNORE_INDEX] * len(ids)) for ids in pieces]
    return concatenate_batch(made, pad_token_id), pad_batch(made, pad_token_id)


@dataclass(frozen=True, slots=True)
class PromptBatch:
    """Prompts to answer together, left-padded: all of them end where generation begins."""

    indices: list[int]
    """Which of the prompts these are."""
    input_ids: Tensor  # (B, T) int64
    attention_mask: Tensor  # (B, T) int64, 1 for real tokens


def prompt_batches(
    prompts: Sequence[Prompt], *, batch_size: int, pad_token_id: int
) -> Iterator[PromptBatch]:
    """All prompts, the longest first, those of about one length together."""
    import torch

    order = longest_first([len(prompt.input_ids) for prompt in prompts])
    for group in chunks(order, batch_size):
        rows = [prompts[i].input_ids for i in group]
        width = max(map(len, rows))
        ids = [[pad_token_id] * (width - len(row)) + row for row in rows]
        mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
        yield PromptBatch(group, torch.tensor(ids), torch.tensor(mask))


def longest_first(sizes: Sequence[int]) -> list[int]:
    """Indices of the sizes, the largest first."""
    return sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))


def chunks(order: list[int], size: int) -> list[list[int]]:
    return [order[at : at + size] for at in range(0, len(order), size)]


def _or_dummy(examples: list[Example], pad_token_id: int) -> list[Example]:
    # A rank without rows still has to take part in the step: it learns nothing from this one,
    # which has a second token so that a shifted label remains to be ignored.
    return examples or [Example([pad_token_id] * 2, [IGNORE_INDEX] * 2)]


def pad_batch(examples: list[Example], pad_token_id: int) -> Batch:
    """Right-padded. Padding is masked by its position and never by its id, which may be the EOS."""
    import torch

    examples = _or_dummy(examples, pad_token_id)
    width = max(len(example.input_ids) for example in examples)
    ids, mask, labels = [], [], []
    for example in examples:
        length = len(example.input_ids)
        ids.append(example.input_ids + [pad_token_id] * (width - length))
        mask.append([1] * length + [0] * (width - length))
        labels.append(example.labels + [IGNORE_INDEX] * (width - length))
    return Batch(torch.tensor(ids), torch.tensor(mask), torch.tensor(labels))


def concatenate_batch(examples: list[Example], pad_token_id: int) -> Batch:
    """End to end. The first token of an example is not to be predicted from the one before it."""
    import torch

    examples = _or_dummy(examples, pad_token_id)
    ids = [token for example in examples for token in example.input_ids]
    labels = [label for e in examples for label in (IGNORE_INDEX, *e.labels[1:])]
    documents = tuple(len(example.input_ids) for example in examples)
    return Batch(torch.tensor([ids]), None, torch.tensor([labels]), documents)
