"""From examples to batches: which examples each rank computes together in each step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import partial
from itertools import accumulate

from qlora_cli.data.batching.collate import chunks, concatenate_batch, longest_first, pad_batch
from qlora_cli.data.batching.links import Links
from qlora_cli.data.batching.mismatch import mismatched, rotated
from qlora_cli.data.batching.order import ExampleIndices, RowOrder
from qlora_cli.data.batching.packing import lengths, own_lengths, supervised
from qlora_cli.data.prepared.mmap_dataset import MmapDataset
from qlora_cli.errors import DataError
from qlora_cli.types import Batch, Example

_Group = tuple[list[ExampleIndices], list[int]]
"""The rows of a micro-batch, and for each of their examples another one (`mismatches`)."""


@dataclass(eq=False)
class BatchStream:
    """The micro-batches of one rank, for any step.

    The rows form one endless sequence (`RowOrder`). Step `s` takes the rows from `s * batch_size`
    on, so the step number alone is enough to resume, on any number of ranks.

    A row is an example; or, packed, as many whole examples as fit into `max_length`. Linked
    examples (`Example.is_linked`) are never parted: a link is shuffled, shared over ranks, mixed
    and packed as if it were one example. So without packing, `batch_size` and `micro_batch_size`
    count links: with pairs, a micro-batch of 4 holds 8 examples.

    Raises:
        DataError: a link is longer than a packed row.
    """

    examples: Sequence[Example]
    _: KW_ONLY
    batch_size: int
    """Rows per step, over all ranks."""
    micro_batch_size: int
    """Maximum rows per forward, on one rank."""
    seed: int
    epochs: float | None
    """Number of epochs; the last step may be shorter than the others. None never ends."""
    pad_token_id: int
    parts: Sequence[tuple[int, float]] | None = None
    """(examples, weight) of each source, consecutive in `examples`; None is one source of weight 1.
    An epoch sees about `weight * n` examples of a source of `n`."""
    max_length: int | None = None
    """Tokens in a packed row; None does not pack."""
    padding: bool = True
    """Put each example into a row of its own, padded to the longest. Otherwise the examples of a
    micro-batch are concatenated, as packed ones are."""
    shares_prefixes: bool = False
    """Compute what linked examples have in common once (`Example.prefix`); not with padding."""
    mismatches: bool = False
    """Follow each example by its prompt with the answer of another example of the step."""
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        sizes = own_lengths if self.shares_prefixes else lengths
        self._lengths = sizes(self.examples)
        self._is_flat = self.max_length is not None or not self.padding
        links = Links(self.examples)
        if self.max_length is not None:
            _refuse_long_links(self.examples, links, self._lengths, self.max_length)
        sources = [(len(self.examples), 1.0)] if self.parts is None else self.parts
        assert sum(number for number, _ in sources) == len(self.examples)
        self._order = RowOrder(
            self._lengths, links, sources, seed=self.seed, max_length=self.max_length
        )
        rows = None if self.epochs is None else self._order.rows_in(self.epochs)
        self._num_rows = None if rows is None else max(1, round(rows))

    @property
    def num_steps(self) -> int:
        """Steps until the last epoch is over."""
        assert self._num_rows is not None, "a stream without epochs never ends"
        return math.ceil(self._num_rows / self.batch_size)

    def rows(self, step: int) -> list[ExampleIndices]:
        """Return the rows of a step over all ranks: the examples in each row, in order.

        After `num_steps` the sequence continues: steps that a run skipped are made up for there.
        """
        first = step * self.batch_size
        last = first + self.batch_size
        if self._num_rows is not None and first < self._num_rows:
            last = min(last, self._num_rows)
        return [self._order.row(position) for position in range(first, last)]

    def micro_batches(self, step: int) -> list[Batch]:
        """Return this rank's share of a step; every rank has the same number of micro-batches.

        The loss of a step is divided by the supervised tokens of all its rows, so it does not
        matter how they are grouped: rows of similar length go together, which saves padding.
        """
        return [self._batch(*group) for group in self._groups(step)]

    def largest(self, num_steps: int) -> list[list[Batch]]:
        """Return steps made of the micro-batches that need the most memory.

        Each has the largest micro-batch that comes first in a step, and the largest that follows
        another one: from the second on, the gradients of the step are in memory too.

        Largest by tokens, padding included, which determine the activations; and by supervised
        tokens, which determine the logits. If both are the same, one step is returned.
        """
        num_supervised = supervised(self.examples)
        found: dict[tuple[str, bool], tuple[int, _Group]] = {}
        for step in range(num_steps):
            for place, group in enumerate(self._groups(step)):
                rows, _ = group
                measures = {
                    "tokens": self._num_places(rows),
                    "supervised": sum(num_supervised[i] for row in rows for i in row),
                }
                for name, size in measures.items():
                    key = name, place > 0
                    if key not in found or size > found[key][0]:
                        found[key] = size, group
        steps = [[found[k][1] for k in found if k[0] == name] for name in ("tokens", "supervised")]
        distinct = steps[:1] if steps[0] == steps[1] else steps
        return [[self._batch(*group) for group in step] for step in distinct]

    def tokens(self, num_steps: int) -> int:
        """Estimate the tokens in the first steps, over all ranks, padding not counted."""
        rows = self._order.epoch(0)
        return round(sum(map(self._length, rows)) / len(rows) * num_steps * self.batch_size)

    def rows_per_epoch(self) -> int:
        """Return the number of rows in the first epoch; packed ones, with packing."""
        return len(self._order.epoch(0))

    def packs_nothing(self) -> bool:
        """Tell if packing leaves each example in a row of its own."""
        return self.max_length is not None and all(len(row) == 1 for row in self._order.epoch(0))

    def summary(self) -> str:
        """Describe the first epoch in one line for the log: how full its rows are."""
        rows = self._order.epoch(0)
        num_tokens = sum(self._length(row) for row in rows)
        if self.max_length is not None:
            number = sum(map(len, rows))
            return (
                f"{number:,} examples in {len(rows):,} rows of {self.max_length:,} tokens, "
                f"{num_tokens / (len(rows) * self.max_length):.1%} full"
            )
        if self._is_flat:
            return "no padding: the examples of a micro-batch lie end to end"
        num_places = 0
        for first in range(0, len(rows), self.batch_size):
            some = rows[first : first + self.batch_size]
            for group in chunks(self._by_length(some), self.micro_batch_size):
                num_places += self._num_places([some[at] for at in group])
        return f"padding {1 - num_tokens / num_places:.1%}"

    def _groups(self, step: int) -> list[_Group]:
        """The rows in each of this rank's micro-batches."""
        rows = self.rows(step)
        others: list[int] = []
        if self.mismatches:
            others = rotated([i for row in rows for i in row], len(self.examples))
        ends = [*accumulate(map(len, rows))]
        order = self._by_length(rows)
        groups = _share(order, self.micro_batch_size, self.rank, self.world_size)
        return [
            (
                [rows[at] for at in group],
                [i for at in group for i in others[ends[at] - len(rows[at]) : ends[at]]],
            )
            for group in groups
        ]

    def _batch(self, rows: list[ExampleIndices], others: list[int]) -> Batch:
        collate = pad_batch
        if self._is_flat:
            collate = partial(concatenate_batch, shares_prefixes=self.shares_prefixes)
        numbers = [i for row in rows for i in row]
        examples = [self.examples[i] for i in numbers]
        if self.mismatches:
            examples = _with_others(examples, [self.examples[i] for i in others])
        batch = collate(examples, self.pad_token_id)
        is_packed = self.max_length is not None
        return replace(batch, examples=tuple(rows) if is_packed else tuple((i,) for i in numbers))

    def _length(self, row: ExampleIndices) -> int:
        return sum(self._lengths[i] for i in row)

    def _num_places(self, rows: list[ExampleIndices]) -> int:
        """Tokens of the rows as one batch, padding included."""
        sizes = [self._lengths[i] for row in rows for i in row] or [0]
        return sum(sizes) if self._is_flat else len(sizes) * max(sizes)

    def _by_length(self, rows: list[ExampleIndices]) -> list[int]:
        return longest_first([self._length(row) for row in rows])


def eval_batches(
    examples: Sequence[Example],
    *,
    batch_size: int,
    pad_token_id: int,
    mismatches: bool = False,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Batch]:
    """Yield this rank's share of all examples, the longest first: an out-of-memory error comes at
    once or never.

    Args:
        batch_size: maximum examples per batch on one rank; links, if examples are linked.
        mismatches: follow each example by its prompt with the answer of another one.
    """
    links = Links(examples)
    order = longest_first(links.totals(lengths(examples)))
    others = rotated(range(len(examples)), len(examples))
    for group in _share(order, batch_size, rank, world_size):
        numbers = [i for link in group for i in links[link]]
        some = [examples[i] for i in numbers]
        if mismatches:
            some = _with_others(some, [examples[others[i]] for i in numbers])
        yield pad_batch(some, pad_token_id)


def _with_others(examples: list[Example], others: list[Example]) -> list[Example]:
    """Follow each example by its prompt with the answer of another one."""
    pairs = zip(examples, others, strict=True)
    return [one for example, other in pairs for one in (example, mismatched(example, other))]


def _share(order: list[int], size: int, rank: int, world_size: int) -> list[list[int]]:
    """Return a rank's groups of up to `size`. All ranks have the same number; some are empty."""
    groups = chunks(order, size)
    groups += [[]] * (-len(groups) % world_size)
    return groups[rank::world_size]


def _refuse_long_links(
    examples: Sequence[Example], links: Links, sizes: Sequence[int], max_length: int
) -> None:
    for link, size in enumerate(links.totals(sizes)):
        if size > max_length and len(links[link]) > 1:
            first, *_, last = links[link]
            place = f"examples {first} to {last}"
            if isinstance(examples, MmapDataset):
                place = examples.place(first)
            raise DataError(
                f"{place}: {last - first + 1} linked rows have {size:,} tokens together, but a "
                f"packed row holds data.max_length {max_length:,}",
                hint=f"raise data.max_length to {size} or more, or set data.packing: false",
            )
