"""Packing: whole examples end to end in rows of at most `max_length` tokens."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

from qlora_cli.data.prepared.mmap_dataset import MmapDataset
from qlora_cli.types import Example

WINDOW = 4096
"""Examples that are packed together. Fewer leave more room; with all of them, an example would meet
the same companions in every pass, as a long one has few that fit beside it."""


def lengths(examples: Sequence[Example]) -> list[int]:
    """Tokens of each example."""
    if isinstance(examples, MmapDataset):
        sizes: list[int] = examples.lengths.tolist()
        return sizes
    return [len(example.input_ids) for example in examples]


def supervised(examples: Sequence[Example]) -> list[int]:
    """Tokens of each example that are learnt."""
    if isinstance(examples, MmapDataset):
        counts: list[int] = examples.num_supervised.tolist()
        return counts
    return [example.num_supervised for example in examples]


def pack_in_windows(
    order: Sequence[int], sizes: Sequence[int], max_length: int
) -> list[tuple[int, ...]]:
    """Rows of whole examples; each example of the order is in one of them, once for each mention.

    Args:
        order: indices of examples.
        sizes: tokens of each example, by index; none is more than `max_length`.
    """
    num_windows = -(-len(order) // WINDOW)
    rows: list[tuple[int, ...]] = []
    for window in range(num_windows):
        # Windows of equal size: a last one of few examples would be packed badly.
        first, last = (len(order) * at // num_windows for at in (window, window + 1))
        part = order[first:last]
        packed = best_fit_decreasing([sizes[i] for i in part], max_length)
        rows += [tuple(part[i] for i in row) for row in packed]
    return rows


def best_fit_decreasing(sizes: Sequence[int], max_length: int) -> list[list[int]]:
    """Indices of `sizes`, in rows whose sizes add up to at most `max_length`.

    The longest first, each into the row that it leaves the least room in: never more than 11/9 of
    the fewest rows possible and one (Johnson 1973), and hardly more than those where many are
    short. Rows with the same room are found together, so this costs O(n log n).
    """
    assert max(sizes, default=0) <= max_length, "an example is longer than a row"
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
