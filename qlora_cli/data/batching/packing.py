"""Packing: several short examples in one row of at most `max_length` tokens."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

from qlora_cli.data.prepared.mmap_dataset import MmapDataset
from qlora_cli.types import Example

WINDOW = 4096
"""Items packed together. Smaller windows leave more room unused. With one window for all items,
an item would meet the same companions in every epoch, because few items fit next to a long one."""


def lengths(examples: Sequence[Example]) -> list[int]:
    """Return the number of tokens in each example."""
    if isinstance(examples, MmapDataset):
        sizes: list[int] = examples.lengths.tolist()
        return sizes
    return [len(example.input_ids) for example in examples]


def own_lengths(examples: Sequence[Example]) -> list[int]:
    """Return the number of tokens in each example that the first of its link does not have."""
    if isinstance(examples, MmapDataset):
        sizes: list[int] = (examples.lengths - examples.prefixes).tolist()
        return sizes
    return [len(example.input_ids) - example.prefix for example in examples]


def supervised(examples: Sequence[Example]) -> list[int]:
    """Return the number of supervised tokens in each example."""
    if isinstance(examples, MmapDataset):
        counts: list[int] = examples.num_supervised.tolist()
        return counts
    return [example.num_supervised for example in examples]


def pack_in_windows(
    order: Sequence[int], sizes: Sequence[int], max_length: int
) -> list[tuple[int, ...]]:
    """Pack whole items into rows. Each mention of an item in `order` is in exactly one row.

    Args:
        order: indices of the items, which are examples or links of several.
        sizes: tokens of each item, by index; at most `max_length`.
    """
    num_windows = -(-len(order) // WINDOW)
    rows: list[tuple[int, ...]] = []
    for window in range(num_windows):
        # Windows of equal size: a small last one would be packed badly.
        first, last = (len(order) * at // num_windows for at in (window, window + 1))
        part = order[first:last]
        packed = best_fit_decreasing([sizes[i] for i in part], max_length)
        rows += [tuple(part[i] for i in row) for row in packed]
    return rows


def best_fit_decreasing(sizes: Sequence[int], max_length: int) -> list[list[int]]:
    """Put the indices of `sizes` into rows whose sizes add up to at most `max_length`.

    The longest goes first, each into the row where it leaves the least room. This never takes more
    than 11/9 of the fewest possible rows plus one (Johnson 1973), and hardly more than the fewest
    if many items are short. Rows with equal room are found together, so the cost is O(n log n).
    """
    assert max(sizes, default=0) <= max_length, "an item is longer than a row"
    rows: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # room -> rows
    rooms: list[int] = []  # its keys, sorted
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        at = bisect_left(rooms, sizes[i])
        if at == len(rooms):
            row, room = len(rows), max_length
            rows.append([])
        else:
            room = rooms[at]
            row = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[at]
        rows[row].append(i)
        left = room - sizes[i]
        if left not in with_room:
            insort(rooms, left)
            with_room[left] = []
        with_room[left].append(row)
    return rows
