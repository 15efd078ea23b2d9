"""Linked examples: consecutive examples that stay together, such as a chosen and a rejected answer.

`Example.is_linked` continues the link of the example before it. An example without a link is a link
of one, so data without links is batched as if there were none.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise

from qlora_cli.data.prepared.mmap_dataset import MmapDataset
from qlora_cli.types import Example


class Links:
    """The links of a dataset, in order. `links[i]` is the range of examples in link `i`."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self._num_examples = len(examples)
        self._starts = _starts(examples)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> range:
        is_last = index + 1 == len(self._starts)
        stop = self._num_examples if is_last else self._starts[index + 1]
        return range(self._starts[index], stop)

    def totals(self, sizes: Sequence[int]) -> Sequence[int]:
        """Sum the sizes of the examples in each link."""
        if len(self) == self._num_examples:
            return sizes
        return [sum(sizes[i] for i in self[link]) for link in range(len(self))]

    def count(self, num_examples: Iterable[int]) -> list[int]:
        """Count the links in consecutive parts of the dataset, such as its sources.

        Args:
            num_examples: examples in each part.
        """
        bounds = [bisect_left(self._starts, at) for at in accumulate(num_examples, initial=0)]
        return [last - first for first, last in pairwise(bounds)]


def link_sizes(examples: Iterable[Example]) -> tuple[int, ...]:
    """Return the number of examples in each link; () if no example is linked."""
    sizes: list[int] = []
    for example in examples:
        if example.is_linked:
            sizes[-1] += 1
        else:
            sizes.append(1)
    return () if all(size == 1 for size in sizes) else tuple(sizes)


def _starts(examples: Sequence[Example]) -> Sequence[int]:
    if isinstance(examples, MmapDataset):
        if not examples.is_linked.any():
            return range(len(examples))
        starts: list[int] = (examples.is_linked == 0).nonzero()[0].tolist()
    else:
        starts = [i for i, example in enumerate(examples) if not example.is_linked]
    assert not len(examples) or starts[:1] == [0], "the first example has nothing to be linked to"
    return starts
