"""Statistics of prepared rows: lengths, supervised tokens, turns, duplicates, leaks."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

from qlora_cli.types import Example

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

NAMED = 3
"""Rows named for each kind of finding."""
_MAX_BARS = 12


class LocatedExamples(Protocol):
    """Examples with their sources and places."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Example: ...
    def source(self, index: int) -> int:
        """Return the index of a row's source."""

    def place(self, index: int) -> str:
        """Return where a row was read: `train.jsonl:17`."""


@dataclass(frozen=True, slots=True)
class RowStatistics:
    """Totals over some rows."""

    num_rows: int
    num_tokens: int
    num_supervised: int
    num_empty: int
    """Rows without a supervised token."""
    num_turns: int
    """Supervised turns."""
    num_unfinished: int
    """Supervised turns that fill their row to its end without a stop token: cut off, or split."""
    num_stopped: int
    """Supervised turns that end in a supervised stop token."""
    num_double_bos: int
    """Rows that begin with two BOS tokens."""
    num_duplicates: int
    """Rows that repeat an earlier one, token by token."""
    num_seen: int
    """Evaluation rows that are also training rows."""
    num_asked: int
    """Evaluation rows whose prompt is in the training rows with another answer."""
    shortest: int
    median: int
    longest: int
    """Length of rows in tokens; of pairs, that of the longer answer with its prompt."""
    num_relabelled: int = 0
    """Rows that repeat an earlier one with another label."""
    num_pairs: int = 0
    """Rows that are pairs of answers."""
    num_equal: int = 0
    """Pairs whose chosen and rejected answers are equal."""
    num_swapped: int = 0
    """Pairs that are the same as an earlier one with the answers swapped."""
    num_longer_chosen: int = 0
    """Pairs whose chosen answer has more tokens."""
    num_longer_rejected: int = 0
    """Pairs whose rejected answer has more tokens."""

    @property
    def unstopped(self) -> int:
        """Supervised turns that end within their row without a stop token."""
        return self.num_turns - self.num_unfinished - self.num_stopped

    @property
    def supervised_share(self) -> float:
        """Share of tokens that are supervised."""
        return self.num_supervised / max(1, self.num_tokens)


@dataclass(frozen=True, slots=True)
class LengthBar:
    """One bar of the histogram of lengths."""

    first: int
    last: int
    """Lengths in tokens, both inclusive."""
    num_rows: int


@dataclass(frozen=True, slots=True)
class DatasetStatistics:
    """Statistics of the training rows, or of the evaluation rows."""

    total: RowStatistics
    sources: list[RowStatistics]
    bars: list[LengthBar]
    """Histogram of lengths."""
    ends: dict[int, int]
    """Token id -> number of supervised turns that it ends."""
    duplicates: list[tuple[int, int]]
    """The first rows that repeat another, each with the earliest equal row (indices)."""
    seen: list[tuple[int, int]]
    """The first evaluation rows that are also training rows, each with the training row."""
    asked: list[tuple[int, int]]
    """The same for evaluation rows whose prompt is in the training rows with another answer."""
    relabelled: list[tuple[int, int]]
    """The first rows that repeat another with another label, each with that row."""
    equal: list[int]
    """The first pairs whose answers are equal."""
    swapped: list[tuple[int, int]]
    """The first pairs that are another one with the answers swapped, each with that row."""

    def record(self) -> dict[str, Any]:
        """Return the totals for the record of the run."""
        return asdict(self.total)


@dataclass(frozen=True, slots=True)
class StatisticsColumns:
    """One column for each figure, with one entry for each row."""

    source: NDArray[np.uint32]
    length: NDArray[np.uint32]
    tokens: NDArray[np.uint64]
    supervised: NDArray[np.uint32]
    turns: NDArray[np.uint32]
    unfinished: NDArray[np.uint32]
    stopped: NDArray[np.uint32]
    double_bos: NDArray[np.uint8]
    duplicate: NDArray[np.bool_]
    seen: NDArray[np.bool_]
    asked: NDArray[np.bool_]
    relabelled: NDArray[np.bool_]
    pairs: NDArray[np.uint8]
    equal: NDArray[np.uint8]
    swapped: NDArray[np.bool_]
    longer_chosen: NDArray[np.bool_]
    longer_rejected: NDArray[np.bool_]

    def figures(self, rows: NDArray[np.bool_]) -> RowStatistics:
        import numpy as np

        lengths = np.sort(self.length[rows])
        shortest, median, longest = (
            (lengths[[0, len(lengths) // 2, -1]]).tolist() if len(lengths) else (0, 0, 0)
        )
        return RowStatistics(
            num_rows=len(lengths),
            num_tokens=int(self.tokens[rows].sum()),
            num_supervised=int(self.supervised[rows].sum()),
            num_empty=int((self.supervised[rows] == 0).sum()),
            num_turns=int(self.turns[rows].sum()),
            num_unfinished=int(self.unfinished[rows].sum()),
            num_stopped=int(self.stopped[rows].sum()),
            num_double_bos=int(self.double_bos[rows].sum()),
            num_duplicates=int(self.duplicate[rows].sum()),
            num_seen=int(self.seen[rows].sum()),
            num_asked=int(self.asked[rows].sum()),
            num_relabelled=int(self.relabelled[rows].sum()),
            num_pairs=int(self.pairs[rows].sum()),
            num_equal=int(self.equal[rows].sum()),
            num_swapped=int(self.swapped[rows].sum()),
            num_longer_chosen=int(self.longer_chosen[rows].sum()),
            num_longer_rejected=int(self.longer_rejected[rows].sum()),
            shortest=shortest,
            median=median,
            longest=longest,
        )


def length_bars(lengths: NDArray[np.uint32]) -> list[LengthBar]:
    """Make up to twelve bars of equal width, which is a round number."""
    import numpy as np

    if not len(lengths):
        return []
    shortest, longest = int(lengths.min()), int(lengths.max())
    width = next(
        width
        for exponent in range(20)
        for width in (10**exponent, 2 * 10**exponent, 5 * 10**exponent)
        if longest // width - shortest // width < _MAX_BARS
    )
    first = shortest // width
    counts = np.bincount(lengths.astype(np.int64) // width - first)
    return [
        LengthBar((first + i) * width, (first + i + 1) * width - 1, count)
        for i, count in enumerate(counts.tolist())
    ]
