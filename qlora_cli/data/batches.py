"""From examples to padded batches, in an order that is a pure function of seed and step."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qlora_cli.types import IGNORE_INDEX, Batch, Example, Prompt

if TYPE_CHECKING:
    from torch import Tensor


class BatchStream:
    """The micro-batches of one rank, for any step.

    The rows form one endless sequence: a permutation of all examples for each epoch, one after the
    other. Step `s` takes the rows from `s * batch_size` on, so that nothing but the step number is
    needed to go on after an interruption, on as many ranks as there are then.

    Args:
        batch_size: rows per step, over all ranks.
        micro_batch_size: most rows per forward, on one rank.
        epochs: how often each example is seen; the last step may be shorter than the others.
            None never ends.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        batch_size: int,
        micro_batch_size: int,
        seed: int,
        epochs: float | None,
        pad_token_id: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._examples = examples
        self._batch_size = batch_size
        self._micro_batch_size = micro_batch_size
        self._seed = seed
        self._num_rows = None if epochs is None else max(1, round(epochs * len(examples)))
        self._pad_token_id = pad_token_id
        self._rank = rank
        self._world_size = world_size
        self._orders: dict[int, list[int]] = {}

    @property
    def num_steps(self) -> int:
        """Steps until each example was seen `epochs` times."""
        assert self._num_rows is not None, "a stream without epochs never ends"
        return math.ceil(self._num_rows / self._batch_size)

    def rows(self, step: int) -> list[int]:
        """The indices of the examples that all ranks together learn from in a step, in order."""
        first = step * self._batch_size
        last = first + self._batch_size
        if self._num_rows is not None:
            last = min(last, self._num_rows)
        assert 0 <= first < last, f"step {step} is outside of the stream"
        places = (divmod(position, len(self._examples)) for position in range(first, last))
        return [self._order(epoch)[place] for epoch, place in places]

    def micro_batches(self, step: int) -> list[Batch]:
        """This rank's share of a step: as many micro-batches as every other rank has.

        The loss of a step is divided by the supervised tokens of all its rows, so it does not
        matter how they are cut: rows of about one length go together, for little padding.
        """
        examples = [self._examples[row] for row in self.rows(step)]
        groups = _share(_by_length(examples), self._micro_batch_size, self._rank, self._world_size)
        return [_collate([examples[i] for i in group], self._pad_token_id) for group in groups]

    def _order(self, epoch: int) -> list[int]:
        # One order is kept: rows are asked for in sequence, so an epoch that is left is over.
        if epoch not in self._orders:
            self._orders = {epoch: _permutation(len(self._examples), self._seed, epoch)}
        return self._orders[epoch]


def eval_batches(
    examples: Sequence[Example],
    *,
    batch_size: int,
    pad_token_id: int,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Batch]:
    """This rank's share of all examples, the longest first (so memory runs out at once or never).

    Args:
        batch_size: most rows per batch, on one rank.
    """
    for group in _share(_by_length(examples), batch_size, rank, world_size):
        yield _collate([examples[i] for i in group], pad_token_id)


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

    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i].input_ids), i))
    for group in _chunks(order, batch_size):
        rows = [prompts[i].input_ids for i in group]
        width = max(map(len, rows))
        ids = [[pad_token_id] * (width - len(row)) + row for row in rows]
        mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
        yield PromptBatch(group, torch.tensor(ids), torch.tensor(mask))


def _permutation(length: int, seed: int, epoch: int) -> list[int]:
    # Python promises that random() repeats itself for a seed in later versions, and a string is
    # hashed by SHA-512; of shuffle() it promises nothing.
    generator = random.Random(f"{seed} {epoch}")
    keys = [generator.random() for _ in range(length)]
    return sorted(range(length), key=keys.__getitem__)


def _by_length(examples: Sequence[Example]) -> list[int]:
    """Indices of the examples, the longest first."""
    return sorted(range(len(examples)), key=lambda i: (-len(examples[i].input_ids), i))


def _share(order: list[int], size: int, rank: int, world_size: int) -> list[list[int]]:
    """The groups of up to `size` that fall to a rank; as many for each rank, so some are empty."""
    groups = _chunks(order, size)
    groups += [[]] * (-len(groups) % world_size)
    return groups[rank::world_size]


def _chunks(order: list[int], size: int) -> list[list[int]]:
    return [order[at : at + size] for at in range(0, len(order), size)]


def _collate(examples: list[Example], pad_token_id: int) -> Batch:
    """Right-padded. Padding is masked by its position and never by its id, which may be the EOS."""
    import torch

    # A rank without rows still has to take part in the step: it learns nothing from this one,
    # which has a second token so that a shifted label remains to be ignored.
    examples = examples or [Example([pad_token_id] * 2, [IGNORE_INDEX] * 2)]
    width = max(len(example.input_ids) for example in examples)
    ids, mask, labels = [], [], []
    for example in examples:
        length = len(example.input_ids)
        ids.append(example.input_ids + [pad_token_id] * (width - length))
        mask.append([1] * length + [0] * (width - length))
        labels.append(example.labels + [IGNORE_INDEX] * (width - length))
    return Batch(torch.tensor(ids), torch.tensor(mask), torch.tensor(labels))
