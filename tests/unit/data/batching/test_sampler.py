from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from qlora_cli.data.batching.collate import prompt_batches, proof_batches
from qlora_cli.data.batching.sampler import BatchStream, eval_batches
from qlora_cli.types import IGNORE_INDEX, Batch, Example, Prompt

PAD = 0


def examples(number: int) -> list[Example]:
    """Build rows of different lengths: the second token is the number, the last the pad id."""
    return [
        Example(
            [1, 100 + i, *[2] * (i * 7 % 11), PAD],
            [IGNORE_INDEX, 100 + i, *[2] * (i * 7 % 11), PAD],
        )
        for i in range(number)
    ]


def stream(number: int, **settings: Any) -> BatchStream:
    known = {"batch_size": 8, "micro_batch_size": 3, "seed": 1, "epochs": 1.0, "pad_token_id": PAD}
    return BatchStream(examples(number), **{**known, **settings})


def order(batches: BatchStream, *steps: int) -> list[int]:
    """The examples of steps, in order, whatever rows they are in."""
    return [i for step in steps for row in batches.rows(step) for i in row]


def rows_of(batches: list[Batch]) -> list[int]:
    """The examples in the batches; dummy rows are left out."""
    seconds = torch.cat([batch.input_ids[:, 1] for batch in batches]).tolist()
    return [second - 100 for second in seconds if second != PAD]


@pytest.mark.parametrize(
    ("number", "epochs", "total"), [(20, 1.0, 20), (20, 2.0, 40), (20, 0.5, 10), (3, 7.0, 21)]
)
def test_each_row_is_seen_once_an_epoch(number: int, epochs: float, total: int) -> None:
    batches = stream(number, epochs=epochs)
    assert batches.num_steps == -(-total // 8)
    seen = order(batches, *range(batches.num_steps))
    assert len(seen) == total
    for start in range(0, total, number):
        epoch = seen[start : start + number]
        assert len(set(epoch)) == len(epoch)
    in_batches = [
        r for step in range(batches.num_steps) for r in rows_of(batches.micro_batches(step))
    ]
    assert Counter(in_batches) == Counter(seen)


def test_epochs_differ_and_seeds_differ() -> None:
    batches = stream(16, epochs=None)
    first, second = order(batches, 0, 1), order(batches, 2, 3)
    assert sorted(first) == sorted(second) == list(range(16))
    assert first != second != list(range(16))
    assert stream(16, seed=2).rows(0) != stream(16, seed=1).rows(0)


def test_steps_are_random_access() -> None:
    steps = range(40)
    in_order = stream(20, epochs=None)
    expected = [in_order.rows(step) for step in steps]
    jumping = stream(20, epochs=None)
    assert [jumping.rows(step) for step in reversed(steps)] == expected[::-1]
    assert [stream(20, epochs=None).rows(step) for step in steps] == expected
    assert stream(20, epochs=None).rows(10**6) == in_order.rows(10**6)


def test_the_order_of_rows_stays_the_same() -> None:
    # Written out: another order would change every run that is resumed in a new process.
    batches = stream(9, batch_size=9, seed=5, epochs=2)
    assert order(batches, 1) == [4, 1, 0, 3, 2, 7, 5, 6, 8]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("number", [16, 17, 21])
def test_ranks_share_the_rows_of_a_step(number: int, world_size: int) -> None:
    ranks = [stream(number, rank=rank, world_size=world_size) for rank in range(world_size)]
    for step in range(ranks[0].num_steps):
        shares = [rank.micro_batches(step) for rank in ranks]
        assert len({len(share) for share in shares}) == 1, "a rank would wait for ever"
        seen = [row for share in shares for row in rows_of(share)]
        assert sorted(seen) == sorted(order(ranks[0], step))
        assert all(len(batch.input_ids) <= 3 for share in shares for batch in share)


def test_a_rank_without_rows_has_no_supervised_tokens() -> None:
    [batch] = stream(1, rank=1, world_size=2).micro_batches(0)
    assert batch.num_supervised == 0
    assert batch.attention_mask.all(), "a row that attends to nothing may give NaN"


def check_padding(batch: Batch, originals: list[Example]) -> None:
    for ids, mask, labels in zip(
        batch.input_ids.tolist(), batch.attention_mask.tolist(), batch.labels.tolist(), strict=True
    ):
        original = originals[ids[1] - 100]
        length = len(original.input_ids)
        assert ids[:length] == original.input_ids
        assert mask == [1] * length + [0] * (len(ids) - length)
        assert labels[:length] == original.labels, (
            "the pad id inside a row is supervised like any other"
        )
        assert set(ids[length:]) <= {PAD}
        assert set(labels[length:]) <= {IGNORE_INDEX}


def test_padding_is_masked_by_position_and_not_by_id() -> None:
    originals = examples(20)
    batches = stream(20)
    for step in range(batches.num_steps):
        for batch in batches.micro_batches(step):
            assert batch.input_ids.dtype == batch.labels.dtype == torch.int64
            check_padding(batch, originals)


def test_rows_of_one_length_go_together() -> None:
    widths = [batch.input_ids.shape[1] for batch in stream(64, batch_size=64).micro_batches(0)]
    assert widths == sorted(widths, reverse=True)
    padded = sum(
        b.input_ids.numel() - b.num_tokens for b in stream(64, batch_size=64).micro_batches(0)
    )
    assert padded <= max(widths) * 3


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_sees_every_row_once(world_size: int) -> None:
    originals = examples(17)
    shares = [
        list(
            eval_batches(
                originals, batch_size=4, pad_token_id=PAD, rank=rank, world_size=world_size
            )
        )
        for rank in range(world_size)
    ]
    assert len({len(share) for share in shares}) == 1
    assert sorted(r for share in shares for r in rows_of(share)) == list(range(17))
    for batch in shares[0]:
        check_padding(batch, originals)


def test_prompts_are_padded_on_the_left() -> None:
    prompts = [Prompt([5] * length, "") for length in (2, 6, 3, 6, 1)]
    batches = list(prompt_batches(prompts, batch_size=2, pad_token_id=PAD))
    assert [batch.indices for batch in batches] == [[1, 3], [2, 0], [4]]
    assert batches[1].input_ids.tolist() == [[5, 5, 5], [PAD, 5, 5]]
    assert batches[1].attention_mask.tolist() == [[1, 1, 1], [0, 1, 1]]
    assert list(prompt_batches([], batch_size=2, pad_token_id=PAD)) == []


def test_packing_is_checked_against_the_same_tokens_unpacked() -> None:
    some = [Example(list(range(n)), [0] * n) for n in (3, 100)]
    packed, padded = proof_batches(some, pad_token_id=0)
    assert packed.documents == (16, 16, 16)
    assert padded.attention_mask is not None
    assert padded.attention_mask.min() == 1
    assert packed.input_ids.tolist() == [padded.input_ids.flatten().tolist()]
    assert padded.input_ids[:2].tolist() == [[0, 1, 2] * 5 + [0], list(range(16))]
