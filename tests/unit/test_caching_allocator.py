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
        (one_after_the_other([50, 40, 30]), 50 * MIB),  # each fits into the first
        (one_after_the_other([20, 30, 40]), 90 * MIB),  # none fits
    ],
)
def test_fixed_segments(events: list[Event], reserved: int) -> None:
    assert replay(events, is_expandable=False)[1] == reserved


def test_a_growing_segment_is_used_again_by_larger_blocks() -> None:
    most, reserved = replay(one_after_the_other([20, 30, 40, 55]), is_expandable=True)
    assert (most, reserved) == (55 * MIB, 60 * MIB)  # pages of 20 MiB


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
