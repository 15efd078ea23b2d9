"""The endless order of training rows: a pure function of the seed and the position."""

from __future__ import annotations

import math
import random
from bisect import bisect_right
from collections.abc import Sequence

from qlora_cli.data.batching.links import Links
from qlora_cli.data.batching.packing import pack_in_windows

ExampleIndices = tuple[int, ...]
"""The examples in a row, by their index."""


class RowOrder:
    """One endless sequence of rows: all epochs one after the other, each in an order of its own.

    A row is a link (most often a single example) or, packed, as many whole links as fit into
    `max_length`. Each epoch is packed anew, window by window of its order, so companions change
    from epoch to epoch, and every epoch still sees each example as often as it would without
    packing. Packed epochs differ by a few rows, so finding a position means packing all epochs
    before it: some seconds for a million examples.

    Args:
        lengths: tokens of each example.
        links: the links of the examples, which are never parted.
        sources: (examples, weight) of each source, consecutive in the dataset. An epoch sees about
            `weight * n` links of a source of `n`.
        max_length: tokens in a packed row; None does not pack.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        links: Links,
        sources: Sequence[tuple[int, float]],
        *,
        seed: int,
        max_length: int | None,
    ) -> None:
        counts = links.count(number for number, _ in sources)
        assert sum(counts) == len(links), "sources part a link"
        self._links = links
        self._sizes = links.totals(lengths)
        self._sources = [(n, weight) for n, (_, weight) in zip(counts, sources, strict=True)]
        self._seed = seed
        self._max_length = max_length
        self._epoch_rows: dict[int, list[ExampleIndices]] = {}
        self._shuffles: dict[tuple[int, int], list[int]] = {}
        self._epoch_starts = [0]

    def row(self, position: int) -> ExampleIndices:
        """Return the row at a position of the endless sequence."""
        if self._max_length is None:
            index, place = divmod(position, self._epoch_size)
        else:
            while self._epoch_starts[-1] <= position:
                rows = self.epoch(len(self._epoch_starts) - 1)
                self._epoch_starts.append(self._epoch_starts[-1] + len(rows))
            index = bisect_right(self._epoch_starts, position) - 1
            place = position - self._epoch_starts[index]
        return self.epoch(index)[place]

    def rows_in(self, epochs: float) -> float:
        """Count the rows in the first epochs."""
        if self._max_length is None:
            return epochs * self._epoch_size
        whole = math.floor(epochs)
        sizes = [len(self.epoch(index)) for index in range(math.ceil(epochs))]
        return sum(sizes[:whole]) + (epochs - whole) * sum(sizes[whole:])

    def epoch(self, index: int) -> list[ExampleIndices]:
        """Return the rows of an epoch, in order."""
        # One epoch is kept: rows are asked for in sequence, so an epoch that was left is over.
        if index not in self._epoch_rows:
            self._epoch_rows = {index: self._make_epoch(index)}
        return self._epoch_rows[index]

    def _make_epoch(self, index: int) -> list[ExampleIndices]:
        chosen = self._choose(index)
        order = [chosen[i] for i in permutation(len(chosen), f"{self._seed} {index}")]
        if self._max_length is None:
            return [tuple(self._links[link]) for link in order]
        packed = pack_in_windows(order, self._sizes, self._max_length)
        shuffled = permutation(len(packed), f"{self._seed} rows {index}")
        return [tuple(i for link in packed[row] for i in self._links[link]) for row in shuffled]

    @property
    def _epoch_size(self) -> int:
        """Links in an epoch."""
        return sum(_links_per_epoch(number, weight) for number, weight in self._sources)

    def _choose(self, index: int) -> list[int]:
        """Choose the links of an epoch: the next part of each source's own endless permutation."""
        chosen: list[int] = []
        first = 0
        for source, (number, weight) in enumerate(self._sources):
            if number == 0:  # none of its rows could be used
                continue
            rounds, rest = divmod(_links_per_epoch(number, weight), number)
            # In the order of the source, as if all were chosen: a weight of 1 changes nothing.
            picked = list(range(number)) * rounds
            for position in range(index * rest, (index + 1) * rest):
                turn, place = divmod(position, number)
                picked.append(self._shuffle(source, turn)[place])
            chosen += [first + i for i in sorted(picked)]
            first += number
        return chosen

    def _shuffle(self, source: int, turn: int) -> list[int]:
        key = source, turn
        if key not in self._shuffles:
            self._shuffles = {k: v for k, v in self._shuffles.items() if k[0] != source}
            name = f"{self._seed} source {source} {turn}"
            self._shuffles[key] = permutation(self._sources[source][0], name)
        return self._shuffles[key]


def permutation(length: int, name: str) -> list[int]:
    """Return a permutation that depends on nothing but its length and name."""
    # Python promises that random() repeats itself for a seed in later versions, and a string is
    # hashed by SHA-512. It promises nothing of shuffle().
    generator = random.Random(name)
    keys = [generator.random() for _ in range(length)]
    return sorted(range(length), key=keys.__getitem__)


def _links_per_epoch(number: int, weight: float) -> int:
    """Links of a source in an epoch: at least one, however small its weight."""
    return max(min(1, number), round(weight * number))
