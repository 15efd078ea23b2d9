"""The model of PyTorch's caching allocator follows its rules."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from benchmarks.caching_allocator import MIB, Event, replay


def one_after_the_other(sizes: Sequence[int]) -> list[Event]:
    """Allocate and free each size before the next."""
    return [event for i, size in enumerate(sizes) for event in ((i, size * MIB), (i, 0))]


@pytest.mark.parametrize(
    ("events", "reserved"),
    [
        ([(0, 100)], 2 * MIB),  # a small segment
        ([(0, MIB)], 2 * MIB),
        ([(0, MIB + 1)], 20 * MIB),  # a shared large one
        ([(0, 3 * MIB), (1, 4 * MIB), (2, 9 * MIB)], 20 * MIB),
        ([(0, 11 * MIB)], 12 * MIB),  # its own
        ([(0, 100), (1, 3 * MIB), (0, 0), (2, 200)], 22 * MIB),
        ([(0, MIB), (1, MIB - 511), (2, 1)], 4 * MIB),  # the second took 1 MiB, all that was left
        ([(0, MIB), (1, MIB - 512), (2, 1)], 2 * MIB),  # 512 bytes were left
        ([(0, 50 * MIB), (0, 0), (1, 49 * MIB), (2, 1 * MIB + 1)], 70 * MIB),  # 1 MiB is not split
        ([(0, 50 * MIB), (0, 0), (1, 48 * MIB), (2, 1 * MIB + 1)], 50 * MIB),  # 2 MiB are
        # The smallest that is large enough is taken, so 30 is left for the last.
        ([(0, 30 * MIB), (1, 20 * MIB), (0, 0), (1, 0), (2, 18 * MIB), (3, 30 * MIB)], 50 * MIB),
        (one_after_the_other([50, 40, 30]), 50 * MIB),  # each fits into the first
        (one_after_the_other([20, 30, 40]), 90 * MIB),  # none fits
    ],
)
def test_fixed_segments(events: list[Event], reserved: int) -> None:
    assert replay(events, is_expandable=False)[1] == reserved


def test_a_growing_segment_is_used_again_by_larger_blocks() -> None:
    most, reserved = replay(one_after_the_other([20, 30, 40, 55]), is_expandable=True)
    assert (most, reserved) == (55 * MIB, 60 * MIB)  # pages of 20 MiB


def test_growing_segments_take_whole_pages_and_give_back_every_rest() -> None:
    assert replay([(0, 100)], is_expandable=True) == (512, 2 * MIB)
    assert replay([(0, 50 * MIB)], is_expandable=True)[1] == 60 * MIB
    # A rest of 512 bytes is joined to the block after it.
    page = 20 * MIB
    events = [(0, page), (1, page), (0, 0), (2, page - 512), (1, 0), (3, page + 512)]
    assert replay(events, is_expandable=True)[1] == 40 * MIB
    assert replay(events, is_expandable=False)[1] == 62 * MIB


def test_the_end_of_a_growing_segment_is_taken_last() -> None:
    # Free: 40 at the start, 20 at the end. 15 goes into 40, so 30 needs a page more at the end.
    start = [(0, 40 * MIB), (1, 20 * MIB), (2, 20 * MIB), (0, 0), (2, 0), (3, 15 * MIB)]
    assert replay(start, is_expandable=True)[1] == 80 * MIB
    assert replay([*start, (4, 30 * MIB)], is_expandable=True)[1] == 100 * MIB


def test_freed_neighbours_are_joined() -> None:
    events = [(0, 20 * MIB), (1, 20 * MIB), (2, 20 * MIB), (1, 0), (0, 0), (3, 40 * MIB)]
    assert replay(events, is_expandable=True)[1] == 60 * MIB
    assert replay(events, is_expandable=False)[1] == 100 * MIB  # neighbours of other segments


@pytest.mark.parametrize("is_expandable", [True, False])
def test_random_sequences_reserve_at_least_what_they_take(is_expandable: bool) -> None:
    generator, live, events = random.Random(0), [], []
    for number in range(3000):
        events.append((number, generator.choice([100, 5000, 2**20, 3 * 2**20, 30 * 2**20])))
        live.append(number)
        while live and generator.random() < 0.5:
            events.append((live.pop(generator.randrange(len(live))), 0))
    most, reserved = replay(events, is_expandable=is_expandable)
    assert most <= reserved <= 1.5 * most
    # The same again needs nothing more, because everything is freed in between.
    freed = [(number, 0) for number in live]
    again = [(number + 3000, size) for number, size in events]
    assert replay(events + freed + again, is_expandable=is_expandable) == (most, reserved)
