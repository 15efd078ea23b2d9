"""Put examples and prompts into tensors: padded, or concatenated without padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qlora_cli.data.batching.links import link_sizes
from qlora_cli.types import IGNORE_INDEX, Batch, Example, Prompt

if TYPE_CHECKING:
    from torch import Tensor

PROOF_TOKENS = 16
"""Tokens of each example in `proof_batches`: few, so that it takes less memory than a step."""


def full_batch(
    num_rows: int,
    max_length: int,
    *,
    padding_free: bool,
    link: int = 1,
    values: tuple[float, ...] = (),
) -> Batch:
    """Return the largest possible batch, every token supervised: a stand-in for real data.

    The last of several rows is one token shorter, because rows hardly ever have the same length.
    So the batch has an attention mask, unless it is padding-free.

    Args:
        link: number of examples in each row (two for pairs).
        values: those of each example.
    """
    number = num_rows * link
    sizes = [max_length] * (number - 1) + [max_length - (number > 1)]
    examples = [
        Example([1] * size, [1] * size, is_linked=at % link > 0, values=values)
        for at, size in enumerate(sizes)
    ]
    return (concatenate_batch if padding_free else pad_batch)(examples, 0)


def proof_batches(examples: Sequence[Example], *, pad_token_id: int) -> tuple[Batch, Batch]:
    """Return three examples packed and the same three padded, to test if a model separates them.

    All three have the same length (a short example is repeated), so no padding is needed. With
    LLM.int8() all tokens of a batch together determine how it is computed, and both batches hold
    the same tokens. The labels are not meaningful.
    """
    some = [examples[i % len(examples)].input_ids for i in range(3)]
    pieces = [(ids * PROOF_TOKENS)[:PROOF_TOKENS] for ids in some]
    made = [Example(ids, [IGNORE_INDEX] * len(ids)) for ids in pieces]
    return concatenate_batch(made, pad_token_id), pad_batch(made, pad_token_id)


def sharing_batches(examples: Sequence[Example], *, pad_token_id: int) -> tuple[Batch, Batch]:
    """Return two documents with a common prefix, whole and with the prefix once.

    They are made of the first example, to test if a model computes a prefix once for both. The
    labels are not meaningful.
    """
    ids = (examples[0].input_ids * PROOF_TOKENS)[:PROOF_TOKENS]
    half = PROOF_TOKENS // 2
    other = [*ids[:half], *reversed(ids[half:])]
    labels = [IGNORE_INDEX] * PROOF_TOKENS
    pair = [Example(ids, labels), Example(other, labels, is_linked=True, prefix=half)]
    apart = concatenate_batch(pair, pad_token_id)
    return apart, concatenate_batch(pair, pad_token_id, shares_prefixes=True)


@dataclass(frozen=True, slots=True)
class PromptBatch:
    """Prompts to answer together, left-padded: all end where generation begins."""

    indices: list[int]
    """Indices of these prompts in the list of all."""
    input_ids: Tensor  # (B, T) int64
    attention_mask: Tensor  # (B, T) int64, 1 for real tokens


def prompt_batches(
    prompts: Sequence[Prompt], *, batch_size: int, pad_token_id: int
) -> Iterator[PromptBatch]:
    """Yield all prompts, the longest first, those of similar length together."""
    import torch

    order = longest_first([len(prompt.input_ids) for prompt in prompts])
    for group in chunks(order, batch_size):
        rows = [prompts[i].input_ids for i in group]
        width = max(map(len, rows))
        ids = [[pad_token_id] * (width - len(row)) + row for row in rows]
        mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
        yield PromptBatch(group, torch.tensor(ids), torch.tensor(mask))


def pad_batch(examples: list[Example], pad_token_id: int) -> Batch:
    """Pad examples on the right.

    The mask follows positions and not the pad token's id, which may also be the EOS.
    """
    import torch

    links = link_sizes(examples)
    examples = _or_dummy(examples, pad_token_id)
    width = max(len(example.input_ids) for example in examples)
    ids, mask, labels = [], [], []
    for example in examples:
        length = len(example.input_ids)
        ids.append(example.input_ids + [pad_token_id] * (width - length))
        mask.append([1] * length + [0] * (width - length))
        labels.append(example.labels + [IGNORE_INDEX] * (width - length))
    return Batch(
        torch.tensor(ids),
        torch.tensor(mask),
        torch.tensor(labels),
        links=links,
        values=_values(examples),
    )


def concatenate_batch(
    examples: list[Example], pad_token_id: int, *, shares_prefixes: bool = False
) -> Batch:
    """Concatenate examples. The first token of one is not predicted from the example before it.

    Args:
        shares_prefixes: leave out what a linked example has in common with the first of its link
            (`Example.prefix`): the last token of it predicts the first one that is left.
    """
    import torch

    links = link_sizes(examples)
    examples = _or_dummy(examples, pad_token_id)
    prefixes = tuple(example.prefix if shares_prefixes else 0 for example in examples)
    ids, labels, documents = [], [], []
    for example, prefix in zip(examples, prefixes, strict=True):
        ids += example.input_ids[prefix:]
        labels += example.labels[prefix:] if prefix else [IGNORE_INDEX, *example.labels[1:]]
        documents.append(len(example.input_ids) - prefix)
    return Batch(
        torch.tensor([ids]),
        None,
        torch.tensor([labels]),
        tuple(documents),
        links=links,
        prefixes=prefixes if any(prefixes) else (),
        values=_values(examples),
    )


def _values(examples: list[Example]) -> tuple[tuple[float, ...], ...]:
    """Return the values of each link, those of its first example; () if there are none."""
    found = tuple(example.values for example in examples if not example.is_linked)
    return found if any(found) else ()


def longest_first(sizes: Sequence[int]) -> list[int]:
    """Return the indices of the sizes, the largest first."""
    return sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))


def chunks(order: list[int], size: int) -> list[list[int]]:
    """Cut a list into chunks of `size`; the last one may be shorter."""
    return [order[at : at + size] for at in range(0, len(order), size)]


def _or_dummy(examples: list[Example], pad_token_id: int) -> list[Example]:
    # A rank without rows still has to take part in the step. It has no supervised token here; the
    # second token is there so that a shifted label remains to be ignored.
    return examples or [Example([pad_token_id] * 2, [IGNORE_INDEX] * 2)]
