from __future__ import annotations

import random
import time
from collections import Counter
from typing import Any

import pytest
import torch

from qlora_cli.data.batching import packing
from qlora_cli.data.batching.packing import best_fit_decreasing, pack_in_windows
from qlora_cli.data.batching.sampler import BatchStream
from qlora_cli.types import IGNORE_INDEX, Batch, Example

MAX_LENGTH = 32


def sizes(number: int, longest: int = MAX_LENGTH, seed: int = 0) -> list[int]:
    generator = random.Random(seed)
    return [generator.randint(1, longest) for _ in range(number)]


def examples(lengths: list[int]) -> list[Example]:
    """Build examples whose tokens are all the example's number (from 1), all supervised."""
    return [Example([i] * n, [i] * n) for i, n in enumerate(lengths, start=1)]


def stream(lengths: list[int], **settings: Any) -> BatchStream:
    known = {
        "batch_size": 4,
        "micro_batch_size": 2,
        "seed": 1,
        "epochs": 1.0,
        "pad_token_id": 0,
        "max_length": MAX_LENGTH,
    }
    return BatchStream(examples(lengths), **{**known, **settings})


def tokens(batches: list[Batch]) -> Counter[int]:
    return Counter(token for batch in batches for token in batch.input_ids.flatten().tolist())


def all_batches(batches: BatchStream) -> list[Batch]:
    return [batch for step in range(batches.num_steps) for batch in batches.micro_batches(step)]


def test_the_best_fit_is_chosen() -> None:
    assert best_fit_decreasing([3, 6, 4, 7], 10) == [[3, 0], [1, 2]]
    assert best_fit_decreasing([10, 1, 9, 5, 5], 10) == [[0], [2, 1], [3, 4]]
    assert best_fit_decreasing([], 10) == []


@pytest.mark.parametrize("seed", range(5))
def test_rows_hold_whole_examples_each_of_them_once(seed: int) -> None:
    lengths = sizes(500, seed=seed)
    rows = best_fit_decreasing(lengths, MAX_LENGTH)
    assert sorted(i for row in rows for i in row) == list(range(500))
    assert max(sum(lengths[i] for i in row) for row in rows) <= MAX_LENGTH
    # Packing never opens a row while another has room: no two rows fit into one.
    fills = sorted(sum(lengths[i] for i in row) for row in rows)
    assert fills[0] + fills[1] > MAX_LENGTH
    assert len(rows) <= 11 / 9 * (sum(lengths) / MAX_LENGTH) * 1.1 + 1


def test_short_examples_fill_rows_and_many_are_packed_in_seconds() -> None:
    generator = random.Random(0)
    lengths = [min(2048, int(generator.lognormvariate(5, 0.8)) + 8) for _ in range(100_000)]
    started = time.process_time()
    rows = pack_in_windows(range(100_000), lengths, 2048)
    assert time.process_time() - started < 3
    assert sum(lengths) / (2048 * len(rows)) > 0.99


def test_windows_lose_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "WINDOW", 7)
    order = [*range(20), 3, 3]
    rows = pack_in_windows(order, sizes(20), MAX_LENGTH)
    assert Counter(i for row in rows for i in row) == Counter(order)


@pytest.mark.parametrize("epochs", [1.0, 2.0, 3.0])
def test_no_token_is_lost_split_or_doubled(epochs: float) -> None:
    lengths = sizes(50)
    batches = stream(lengths, epochs=epochs)
    assert tokens(all_batches(batches)) == {i: epochs * n for i, n in enumerate(lengths, start=1)}
    for batch in all_batches(batches):
        documents = batch.input_ids[0].split(batch.documents)
        assert all(len(ids) == lengths[ids[0] - 1] for ids in documents)
        assert all((ids == ids[0]).all() for ids in documents)
    for step in range(batches.num_steps):
        rows = batches.rows(step)
        assert all(sum(lengths[i] for i in row) <= MAX_LENGTH for row in rows)


def test_a_batch_is_one_row_without_supervision_across_documents() -> None:
    [batch] = stream([3, 2, 4], batch_size=1, micro_batch_size=1).micro_batches(0)
    assert batch.documents == (4, 3, 2)
    assert batch.attention_mask is None
    assert batch.input_ids.tolist() == [[3, 3, 3, 3, 1, 1, 1, 2, 2]]
    ignored = IGNORE_INDEX
    assert batch.labels.tolist() == [[ignored, 3, 3, 3, ignored, 1, 1, ignored, 2]]
    assert (batch.num_tokens, batch.num_supervised) == (9, 6)
    inputs = batch.inputs()
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2, 0, 1]]
    assert inputs["cu_seq_lens_q"].tolist() == [0, 4, 7, 9]
    assert inputs["cu_seq_lens_q"].dtype == torch.int32
    assert inputs["max_length_q"] == 4


def test_supervised_tokens_are_counted_as_without_packing() -> None:
    lengths = [n + 1 for n in sizes(40, longest=20)]
    packed = sum(batch.num_supervised for batch in all_batches(stream(lengths)))
    padded = all_batches(stream(lengths, max_length=None))
    assert packed == sum(batch.num_supervised for batch in padded) == sum(lengths) - 40
    assert sum(batch.num_tokens for batch in padded) == sum(lengths)


def test_steps_are_random_access_and_epochs_differ() -> None:
    lengths = sizes(60)
    expected = [stream(lengths, epochs=None).rows(step) for step in range(40)]
    in_order = stream(lengths, epochs=None)
    assert [in_order.rows(step) for step in range(40)] == expected
    assert [in_order.rows(step) for step in reversed(range(40))] == expected[::-1]
    assert len({tuple(sorted(rows)) for rows in expected}) == 40


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_share_the_rows_of_a_step(world_size: int) -> None:
    lengths = sizes(50)
    ranks = [stream(lengths, rank=rank, world_size=world_size) for rank in range(world_size)]
    seen: Counter[int] = Counter()
    for step in range(ranks[0].num_steps):
        shares = [rank.micro_batches(step) for rank in ranks]
        assert len({len(share) for share in shares}) == 1
        for share in shares:
            seen += tokens(share)
    assert {i: n for i, n in seen.items() if i} == dict(enumerate(lengths, start=1))


def test_the_summary_gives_fill_and_padding() -> None:
    assert stream([16, 16, 32, 8]).summary() == "4 examples in 3 rows of 32 tokens, 75.0% full"
    assert stream([10, 10, 4, 6], max_length=None).summary() == "padding 6.2%"


@pytest.mark.parametrize("max_length", [None, MAX_LENGTH])
def test_a_weight_sets_the_share_of_a_source_per_epoch(max_length: int | None) -> None:
    parts = [(10, 2.0), (8, 0.5), (6, 1.0)]
    batches = stream(sizes(24), parts=parts, max_length=max_length, epochs=2)
    rows = [row for step in range(batches.num_steps) for row in batches.rows(step)]
    seen = Counter(i for row in rows for i in row)
    assert [seen[i] for i in range(10)] == [4] * 10
    # Half of the source in each pass, and another half in the next one.
    assert [seen[i] for i in range(10, 18)] == [1] * 8
    assert [seen[i] for i in range(18, 24)] == [2] * 6


def test_a_weight_of_one_changes_nothing() -> None:
    lengths = sizes(24)
    whole = stream(lengths, epochs=None, max_length=None)
    parts = stream(lengths, epochs=None, max_length=None, parts=[(20, 1.0), (4, 1.0)])
    assert [whole.rows(step) for step in range(20)] == [parts.rows(step) for step in range(20)]


def test_parts_of_a_source_differ_between_epochs() -> None:
    parts = [(9, 1 / 3), (2, 1.0)]
    expected = [
        stream(sizes(11), batch_size=5, parts=parts, epochs=None, max_length=None).rows(step)
        for step in range(9)
    ]
    for turn in range(3):
        some = [i for rows in expected[3 * turn : 3 * turn + 3] for (i,) in rows if i < 9]
        assert sorted(some) == list(range(9))
    in_order = stream(sizes(11), batch_size=5, parts=parts, epochs=None, max_length=None)
    assert [in_order.rows(step) for step in reversed(range(9))] == expected[::-1]
