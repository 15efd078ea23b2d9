"""Advice when memory runs out."""

from __future__ import annotations

import pytest
import torch

from qlora_cli.loop.monitor import halved_max_length
from qlora_cli.types import Batch


def end_to_end(*lengths: int) -> Batch:
    ids = torch.ones(1, sum(lengths), dtype=torch.long)
    return Batch(ids, None, ids, lengths)


def padded(rows: int, length: int) -> Batch:
    ids = torch.ones(rows, length, dtype=torch.long)
    return Batch(ids, torch.ones_like(ids), ids)


@pytest.mark.parametrize(
    ("batches", "expected"),
    [
        ([end_to_end(2048, 2048, 2048, 2048)], 1024),
        ([end_to_end(100, 300), end_to_end(600)], 300),
        ([padded(4, 500), padded(4, 900)], 450),
        ([end_to_end(9, 9, 9)], None),
    ],
    ids=["full", "short", "padded", "no-shorter"],
)
def test_the_advised_length_is_half_of_the_longest_row(
    batches: list[Batch], expected: int | None
) -> None:
    assert halved_max_length(batches, max_length=2048, is_packed=False) == expected


def test_packed_rows_count_as_long_as_max_length() -> None:
    batch = end_to_end(*[64] * 32)
    assert halved_max_length([batch], max_length=2048, is_packed=True) == 1024


def test_the_advised_length_never_exceeds_the_recipes() -> None:
    # Virtual tokens come on top.
    assert halved_max_length([padded(1, 80)], max_length=32, is_packed=False) == 16
