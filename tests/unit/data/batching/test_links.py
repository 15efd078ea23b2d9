"""Linked examples: no batch parts a link, and data without links is batched as before."""

from __future__ import annotations

from collections import Counter
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_cli.data.batching.links import Links, link_sizes
from qlora_cli.data.batching.sampler import BatchStream, eval_batches
from qlora_cli.data.prepared.mmap_dataset import DatasetWriter, MmapDataset
from qlora_cli.errors import DataError
from qlora_cli.types import Batch, Example
from tests.unit.data.batching import stream_digests

MAX_LENGTH = 16
LINKS = st.lists(
    st.lists(st.integers(1, MAX_LENGTH), min_size=1, max_size=4).filter(
        lambda sizes: sum(sizes) <= MAX_LENGTH
    ),
    min_size=1,
    max_size=30,
)
"""Lengths of the examples in each link; a link fits into a packed row."""


def linked(links: list[list[int]]) -> list[Example]:
    """The tokens of an example are its number (from 1), all of them supervised."""
    firsts = [place > 0 for sizes in links for place in range(len(sizes))]
    lengths = [size for sizes in links for size in sizes]
    return [
        Example([i] * size, [i] * size, is_linked)
        for i, (size, is_linked) in enumerate(zip(lengths, firsts, strict=True), start=1)
    ]


def spans(links: list[list[int]]) -> list[tuple[int, ...]]:
    """The examples in each link, by their index."""
    bounds = pairwise(accumulate(map(len, links), initial=0))
    return [tuple(range(first, last)) for first, last in bounds]


def examples_in(batch: Batch) -> list[int]:
    """The examples in a batch by its tokens, in order; the dummy of an idle rank is left out."""
    if batch.documents:
        firsts = accumulate(batch.documents[:-1], initial=0)
        numbers = [int(batch.input_ids[0, at]) for at in firsts]
    else:
        numbers = batch.input_ids[:, 0].tolist()
    return [number - 1 for number in numbers if number]


def links_in(batch: Batch) -> list[tuple[int, ...]]:
    """The examples in each link of a batch, by its own account."""
    found = examples_in(batch)
    bounds = pairwise(accumulate(batch.links or [1] * len(found), initial=0))
    groups = [tuple(found[first:last]) for first, last in bounds]
    assert sum(map(len, groups)) == len(found)
    return groups


@settings(max_examples=150, deadline=None)
@given(
    links=LINKS,
    layout=st.sampled_from([{}, {"padding": False}, {"max_length": MAX_LENGTH}]),
    world_size=st.integers(1, 3),
    batch_size=st.integers(1, 7),
    micro_batch_size=st.integers(1, 4),
    epochs=st.integers(1, 3),
    seed=st.integers(0, 9),
)
def test_every_link_is_whole_and_in_each_epoch_once(
    links: list[list[int]], layout: dict[str, Any], world_size: int, **options: Any
) -> None:
    streams = [
        BatchStream(
            linked(links), rank=rank, world_size=world_size, pad_token_id=0, **layout, **options
        )
        for rank in range(world_size)
    ]
    seen: Counter[tuple[int, ...]] = Counter()
    for step in range(streams[0].num_steps):
        shares = [stream.micro_batches(step) for stream in streams]
        assert len({len(share) for share in shares}) == 1
        for batch in (batch for share in shares for batch in share):
            seen.update(links_in(batch))
            if not layout:
                assert len(links_in(batch)) <= options["micro_batch_size"]
    if "max_length" in layout:
        rows = [row for step in range(streams[0].num_steps) for row in streams[0].rows(step)]
        sizes = [size for link in links for size in link]
        assert all(sum(sizes[i] for i in row) <= MAX_LENGTH for row in rows)
    assert seen == Counter(dict.fromkeys(spans(links), options["epochs"]))


@settings(max_examples=50, deadline=None)
@given(
    sources=st.lists(st.tuples(LINKS, st.sampled_from([0.5, 1.0, 2.0])), min_size=1, max_size=3),
    max_length=st.sampled_from([None, MAX_LENGTH]),
)
def test_mixed_sources_take_whole_links(
    sources: list[tuple[list[list[int]], float]], max_length: int | None
) -> None:
    links = [link for one, _ in sources for link in one]
    stream = BatchStream(
        linked(links),
        parts=[(sum(map(len, one)), weight) for one, weight in sources],
        batch_size=3,
        micro_batch_size=2,
        seed=0,
        epochs=2,
        pad_token_id=0,
        max_length=max_length,
    )
    steps = range(stream.num_steps)
    seen = Counter(link for s in steps for b in stream.micro_batches(s) for link in links_in(b))
    assert set(seen) <= set(spans(links))
    first = 0
    for one, weight in sources:
        of_source = spans(links)[first : first + len(one)]
        assert sum(seen[link] for link in of_source) == 2 * max(1, round(weight * len(one)))
        first += len(one)


@settings(max_examples=50, deadline=None)
@given(links=LINKS, batch_size=st.integers(1, 5), world_size=st.integers(1, 3))
def test_evaluation_sees_every_link_once(
    links: list[list[int]], batch_size: int, world_size: int
) -> None:
    found = [
        link
        for rank in range(world_size)
        for batch in eval_batches(
            linked(links),
            batch_size=batch_size,
            pad_token_id=0,
            rank=rank,
            world_size=world_size,
        )
        for link in links_in(batch)
    ]
    assert sorted(found) == spans(links)


def test_a_batch_gives_the_links_of_its_rows() -> None:
    pairs = linked([[3, 2], [4, 1], [2, 2]])
    stream = BatchStream(pairs, batch_size=2, micro_batch_size=2, seed=0, epochs=1, pad_token_id=0)
    assert stream.num_steps == 2, "a batch size of 2 is two pairs"
    [batch] = stream.micro_batches(0)
    assert (batch.input_ids.shape, batch.links) == ((4, 4), (2, 2))
    assert batch.to(batch.input_ids.device).links == (2, 2)
    assert [len(row) for row in batch.examples] == [1] * 4
    assert link_sizes(linked([[3], [4]])) == ()


@pytest.mark.parametrize("is_stored", [True, False], ids=["on disk", "in memory"])
def test_a_link_longer_than_a_packed_row_is_refused(tmp_path: Path, is_stored: bool) -> None:
    examples: Any = linked([[3], [9, 8]])
    if is_stored:
        examples = stored(tmp_path, examples)
    known = {"batch_size": 1, "micro_batch_size": 1, "seed": 0, "epochs": 1, "pad_token_id": 0}
    BatchStream(examples, **known)
    with pytest.raises(DataError, match="2 linked rows have 17 tokens together") as caught:
        BatchStream(examples, **known, max_length=16)
    assert str(caught.value).startswith("a.jsonl:2: " if is_stored else "examples 1 to 2: ")
    assert "data.max_length to 17" in str(caught.value.hint)


def stored(folder: Path, examples: list[Example]) -> MmapDataset:
    with DatasetWriter(folder) as writer:
        for number, example in enumerate(examples, start=1):
            writer.add(example, 0, f"a.jsonl:{number}")
        writer.close({})
    return MmapDataset(folder)


def test_links_are_kept_on_disk_and_are_part_of_the_digest(tmp_path: Path) -> None:
    examples = linked([[3], [2, 4], [1, 1, 1]])
    dataset = stored(tmp_path, examples)
    assert list(dataset) == examples
    found = Links(dataset)
    assert [tuple(found[i]) for i in range(len(found))] == [(0,), (1, 2), (3, 4, 5)]
    assert found.totals(dataset.lengths.tolist()) == [3, 6, 3]
    assert found.count([3, 3]) == [2, 1]
    digests = set()
    for name, some in {"linked": linked([[2, 2]]), "apart": linked([[2], [2]])}.items():
        (tmp_path / name).mkdir()
        with DatasetWriter(tmp_path / name) as writer:
            for example in some:
                writer.add(example, 0, "a.jsonl:1")
            digests.add(writer.digest)
    assert len(digests) == 2


@pytest.mark.parametrize("name", stream_digests.KNOWN)
def test_data_without_links_is_batched_as_before(name: str) -> None:
    arguments = stream_digests.settings()[name]
    assert stream_digests.digest_of(Example, BatchStream, arguments) == stream_digests.KNOWN[name]


def test_every_setting_has_a_digest() -> None:
    assert list(stream_digests.KNOWN) == list(stream_digests.settings())
