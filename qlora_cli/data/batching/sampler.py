"""From examples to padded or packed batches: their order is a pure function of seed and step."""

from __future__ import annotations

import math
import random
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from qlora_cli.data.batching.collate import chunks, concatenate_batch, longest_first, pad_batch
from qlora_cli.data.batching.packing import lengths, pack_in_windows, supervised
from qlora_cli.types import Batch, Example

if TYPE_CHECKING:
    pass


class BatchStream:
    """The micro-batches of one rank, for any step.

    The rows form one endless sequence: those of each pass in an order of its own, one pass after
    the other. Step `s` takes the rows from `s * batch_size` on, so that nothing but the step number
    is needed to go on after an interruption, on as many ranks as there are then.

    A row is an example; or, packed, as many whole examples as fit into `max_length`. The examples
    of each pass are packed anew, window by window of their order, so companions change from pass to
    pass and every pass still sees each example as often as it would without packing. As passes then
    differ by a few rows, where the rows of a step begin follows from packing the passes before it:
    some seconds for a million examples.

    Args:
        parts: (examples, weight) of each source, consecutive in `examples`; None is one source of
            weight 1. A pass sees about `weight * n` rows of a source of n.
        batch_size: rows per step, over all ranks.
        micro_batch_size: most rows per forward, on one rank.
        epochs: how many passes are made; the last step may be shorter than the others.
            None never ends.
        max_length: pack the examples into rows of so many tokens; None does not pack.
        padding: put each example into a row of its own, filled up to the longest. Otherwise those
            of a micro-batch lie end to end, as packed ones do.
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
        parts: Sequence[tuple[int, float]] | None = None,
        max_length: int | None = None,
        padding: bool = True,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._examples = examples
        self._lengths = lengths(examples)
        self._batch_size = batch_size
        self._micro_batch_size = micro_batch_size
        self._seed = seed
        self._parts = [(len(examples), 1.0)] if parts is None else parts
        assert sum(number for number, _ in self._parts) == len(examples)
        self._max_length = max_length
        self._is_flat = max_length is not None or not padding
        self._pad_token_id = pad_token_id
        self._rank = rank
        self._world_size = world_size
        self._kept: dict[int, list[tuple[int, ...]]] = {}
        self._turns: dict[tuple[int, int], list[int]] = {}
        self._starts = [0]
        self._num_rows = None if epochs is None else max(1, round(self._rows_before(epochs)))

    @property
    def num_steps(self) -> int:
        """Steps until all passes are made."""
        assert self._num_rows is not None, "a stream without epochs never ends"
        return math.ceil(self._num_rows / self._batch_size)

    def rows(self, step: int) -> list[tuple[int, ...]]:
        """The rows that all ranks together learn from in a step: the examples of each, in order.

        After `num_steps` it goes on: rows that a run passed over are made up for from there.
        """
        first = step * self._batch_size
        last = first + self._batch_size
        if self._num_rows is not None and first < self._num_rows:
            last = min(last, self._num_rows)
        return [self._row(position) for position in range(first, last)]

    def micro_batches(self, step: int) -> list[Batch]:
        """This rank's share of a step: as many micro-batches as every other rank has.

        The loss of a step is divided by the supervised tokens of all its rows, so it does not
        matter how they are cut: rows of about one length go together, for little padding.
        """
        rows = self.rows(step)
        order = self._by_length(rows)
        groups = _share(order, self._micro_batch_size, self._rank, self._world_size)
        return [self._batch([rows[at] for at in group]) for group in groups]

    def largest(self, num_steps: int) -> list[list[Batch]]:
        """Steps put together from the micro-batches that need the most memory: of all that come
        first in a step the largest, and of those that follow. From the second on, the gradients of
        the step are in memory too.

        Largest by tokens, padding included, as activations go by them; and by tokens that are
        learnt, as logits do. Often it is the same, and then it is one step.
        """
        learnt = supervised(self._examples)
        found: dict[tuple[str, bool], tuple[int, list[tuple[int, ...]]]] = {}
        for step in range(num_steps):
            rows = self.rows(step)
            order = self._by_length(rows)
            groups = _share(order, self._micro_batch_size, self._rank, self._world_size)
            for place, group in enumerate(groups):
                chosen = [rows[at] for at in group]
                sizes = [self._length(row) for row in chosen] or [0]
                measures = {
                    "tokens": sum(sizes) if self._is_flat else len(sizes) * max(sizes),
                    "learnt": sum(learnt[i] for row in chosen for i in row),
                }
                for name, size in measures.items():
                    key = name, place > 0
                    if key not in found or size > found[key][0]:
                        found[key] = size, chosen
        steps = [[found[k][1] for k in found if k[0] == name] for name in ("tokens", "learnt")]
        distinct = steps[:1] if steps[0] == steps[1] else steps
        return [[self._batch(rows) for rows in step] for step in distinct]

    def tokens(self, num_steps: int) -> int:
        """About how many tokens so many steps learn from, over all ranks, padding not counted."""
        rows = self._pass(0)
        return round(sum(map(self._length, rows)) / len(rows) * num_steps * self._batch_size)

    def summary(self) -> str:
        """One line for the log about the first pass: how full its rows are, or their padding."""
        rows = self._pass(0)
        num_tokens = sum(self._length(row) for row in rows)
        if self._max_length is not None:
            number = sum(map(len, rows))
            return (
                f"{number:,} examples in {len(rows):,} rows of {self._max_length:,} tokens, "
                f"{num_tokens / (len(rows) * self._max_length):.1%} full"
            )
        if self._is_flat:
            return "no padding: the examples of a micro-batch lie end to end"
        num_places = 0
        for first in range(0, len(rows), self._batch_size):
            some = rows[first : first + self._batch_size]
            for group in chunks(self._by_length(some), self._micro_batch_size):
                num_places += len(group) * max(self._length(some[at]) for at in group)
        return f"padding {1 - num_tokens / num_places:.1%}"

    def _batch(self, rows: list[tuple[int, ...]]) -> Batch:
        collate = concatenate_batch if self._is_flat else pad_batch
        batch = collate([self._examples[i] for row in rows for i in row], self._pad_token_id)
        return replace(batch, examples=tuple(rows))

    def _length(self, row: tuple[int, ...]) -> int:
        return sum(self._lengths[i] for i in row)

    def _by_length(self, rows: list[tuple[int, ...]]) -> list[int]:
        return longest_first([self._length(row) for row in rows])

    def _row(self, position: int) -> tuple[int, ...]:
        if self._max_length is None:
            index, place = divmod(position, self._pass_size)
        else:
            while self._starts[-1] <= position:
                self._starts.append(self._starts[-1] + len(self._pass(len(self._starts) - 1)))
            index = bisect_right(self._starts, position) - 1
            place = position - self._starts[index]
        return self._pass(index)[place]

    def _rows_before(self, epochs: float) -> float:
        whole = math.floor(epochs)
        if self._max_length is None:
            return epochs * self._pass_size
        sizes = [len(self._pass(index)) for index in range(math.ceil(epochs))]
        return sum(sizes[:whole]) + (epochs - whole) * sum(sizes[whole:])

    @property
    def _pass_size(self) -> int:
        """Examples of a pass."""
        return sum(_share_of_pass(number, weight) for number, weight in self._parts)

    def _pass(self, index: int) -> list[tuple[int, ...]]:
        """The rows of a pass, in order."""
        # One pass is kept: rows are asked for in sequence, so a pass that is left is over.
        if index not in self._kept:
            chosen = self._choose(index)
            order = [chosen[i] for i in _permutation(len(chosen), f"{self._seed} {index}")]
            rows: list[tuple[int, ...]] = [(i,) for i in order]
            if self._max_length is not None:
                packed = pack_in_windows(order, self._lengths, self._max_length)
                shuffled = _permutation(len(packed), f"{self._seed} rows {index}")
                rows = [packed[i] for i in shuffled]
            self._kept = {index: rows}
        return self._kept[index]

    def _choose(self, index: int) -> list[int]:
        """The examples of a pass: of each source the next part of its own endless permutation."""
        chosen: list[int] = []
        first = 0
        for source, (number, weight) in enumerate(self._parts):
            if number == 0:  # nothing of it was left to learn
                continue
            rounds, rest = divmod(_share_of_pass(number, weight), number)
            # In the order of the source, as all of them would be: a weight of 1 changes nothing.
            picked = list(range(number)) * rounds
            for position in range(index * rest, (index + 1) * rest):
                turn, place = divmod(position, number)
                picked.append(self._turn(source, turn)[place])
            chosen += [first + i for i in sorted(picked)]
            first += number
        return chosen

    def _turn(self, source: int, turn: int) -> list[int]:
        key = source, turn
        if key not in self._turns:
            self._turns = {k: v for k, v in self._turns.items() if k[0] != source}
            name = f"{self._seed} source {source} {turn}"
            self._turns[key] = _permutation(self._parts[source][0], name)
        return self._turns[key]


def _share_of_pass(number: int, weight: float) -> int:
    """Rows of a source in a pass: a source that is named is not left out."""
    return max(min(1, number), round(weight * number))


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
    order = longest_first(lengths(examples))
    for group in _share(order, batch_size, rank, world_size):
        yield pad_batch([examples[i] for i in group], pad_token_id)


def _permutation(length: int, name: str) -> list[int]:
    # Python promises that random() repeats itself for a seed in later versions, and a string is
    # hashed by SHA-512; of shuffle() it promises nothing.
    generator = random.Random(name)
    keys = [generator.random() for _ in range(length)]
    return sorted(range(length), key=keys.__getitem__)


def _share(order: list[int], size: int, rank: int, world_size: int) -> list[list[int]]:
    """The groups of up to `size` that fall to a rank; as many for each rank, so some are empty."""
    groups = chunks(order, size)
    groups += [[]] * (-len(groups) % world_size)
    return groups[rank::world_size]
