"""Statistics of prepared rows: lengths, supervised tokens, turns, duplicates, leaks.

Every figure comes from the tokens and labels that the model will see, and not from what the rows
were meant to become. One pass takes time linear in the tokens and keeps a few hashes and lengths
per row.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

from qlora_cli.types import IGNORE_INDEX, Example

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerFast

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
    """Length of rows in tokens."""

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

    def record(self) -> dict[str, Any]:
        """Return the totals for the record of the run."""
        return asdict(self.total)


def scan(
    rows: LocatedExamples, tokenizer: PreTrainedTokenizerFast, *, max_length: int
) -> DatasetScan:
    """Scan each row once."""
    scan = DatasetScan(
        added_token_ids=tokenizer.added_tokens_decoder,
        bos_token_id=tokenizer.bos_token_id,
        max_length=max_length,
    )
    for row in range(len(rows)):
        scan.add(rows[row], rows.source(row))
    return scan


class DatasetScan:
    """Counts and 8-byte hashes of training or evaluation rows.

    Args:
        added_token_ids: tokens that can stop a turn.
        max_length: tokens per row; a row of this length may have been cut off.
    """

    def __init__(
        self, *, added_token_ids: Collection[int], bos_token_id: int | None, max_length: int
    ) -> None:
        self._added = frozenset(added_token_ids)
        self._bos = bos_token_id
        self._max_length = max_length
        # Per row.
        self._sources = array("I")
        self._lengths = array("I")
        self._supervised = array("I")
        self._turns = array("I")
        self._unfinished = array("I")
        self._stopped = array("I")
        self._double_bos = array("B")
        self._hashes = array("Q")
        self._last_prompts = array("Q")
        # Per supervised turn: its prompt is everything before it.
        self._prompts = array("Q")
        self._prompt_rows = array("Q")
        self._ends: Counter[int] = Counter()

    def add(self, example: Example, source: int = 0) -> None:
        """Add the next row.

        Args:
            source: index of its source.
        """
        ids, row = example.input_ids, len(self._hashes)
        turns = supervised_turns(example.labels)
        tokens = array("I", ids)
        digest = hashlib.blake2b(digest_size=8)
        at = prompt = num_cut = num_stopped = 0
        for first, after in turns:
            digest.update(tokens[at:first])
            at = first
            # One token is not a prompt: it is a BOS, or the last token of the piece before.
            if first > 1:
                prompt = _number(digest.digest())
                self._prompts.append(prompt)
                self._prompt_rows.append(row)
            end = ids[after - 1]
            # If prompts are supervised too, so is the line break after the stop token.
            if first == 0 and end not in self._added:
                end = ids[max(0, after - 2)]
            if end in self._added:
                self._ends[end] += 1
                num_stopped += 1
            elif after == len(ids) == self._max_length:
                num_cut += 1
        digest.update(tokens[at:])
        self._sources.append(source)
        self._lengths.append(len(ids))
        # The first token of a row has no predecessor to be predicted from.
        self._supervised.append(sum(after - max(1, first) for first, after in turns))
        self._turns.append(len(turns))
        self._unfinished.append(num_cut)
        self._stopped.append(num_stopped)
        self._double_bos.append(self._bos is not None and ids[:2] == [self._bos] * 2)
        self._hashes.append(_number(digest.digest()))
        self._last_prompts.append(prompt)

    def first_rows(self, source: int, count: int | None) -> list[int]:
        """Return the first rows of a source; all of them if `count` is None."""
        import numpy as np

        rows: list[int] = np.flatnonzero(np.array(self._sources) == source)[:count].tolist()
        return rows

    def longer_than(self, length: int) -> list[int]:
        """Return the rows with more than `length` tokens."""
        import numpy as np

        rows: list[int] = np.flatnonzero(np.array(self._lengths) > length).tolist()
        return rows

    def audit(self, training: DatasetScan | None = None) -> DatasetStatistics:
        """Compute the statistics.

        Args:
            training: the scan of the training rows, if these are evaluation rows.
        """
        import numpy as np

        hashes = np.array(self._hashes)
        _, first_rows, which = np.unique(hashes, return_index=True, return_inverse=True)
        earliest = first_rows[which]
        is_duplicate = earliest != np.arange(len(hashes))
        seen = asked = np.full(len(hashes), -1)
        if training is not None:
            seen = _look_up(hashes, np.array(training._hashes))
            prompts = _look_up(np.array(self._last_prompts), np.array(training._prompts))
            # -1 (not found) picks the -1 appended at the end.
            rows = np.append(np.array(training._prompt_rows, np.int64), -1)
            asked = np.where(seen < 0, rows[prompts], -1)
        table = _StatisticsColumns(
            source=np.array(self._sources),
            length=np.array(self._lengths),
            supervised=np.array(self._supervised),
            turns=np.array(self._turns),
            unfinished=np.array(self._unfinished),
            stopped=np.array(self._stopped),
            double_bos=np.array(self._double_bos),
            duplicate=is_duplicate,
            seen=seen >= 0,
            asked=asked >= 0,
        )
        return DatasetStatistics(
            total=table.figures(np.full(len(hashes), True)),
            sources=[table.figures(table.source == i) for i in np.unique(table.source)],
            bars=_bars(table.length),
            ends=dict(self._ends.most_common()),
            duplicates=_first_pairs(np.where(is_duplicate, earliest, -1)),
            seen=_first_pairs(seen),
            asked=_first_pairs(asked),
        )


@dataclass(frozen=True, slots=True)
class _StatisticsColumns:
    """One column per figure, one entry per row."""

    source: NDArray[np.uint32]
    length: NDArray[np.uint32]
    supervised: NDArray[np.uint32]
    turns: NDArray[np.uint32]
    unfinished: NDArray[np.uint32]
    stopped: NDArray[np.uint32]
    double_bos: NDArray[np.uint8]
    duplicate: NDArray[np.bool_]
    seen: NDArray[np.bool_]
    asked: NDArray[np.bool_]

    def figures(self, rows: NDArray[np.bool_]) -> RowStatistics:
        import numpy as np

        lengths = np.sort(self.length[rows])
        shortest, median, longest = (
            (lengths[[0, len(lengths) // 2, -1]]).tolist() if len(lengths) else (0, 0, 0)
        )
        return RowStatistics(
            num_rows=len(lengths),
            num_tokens=int(lengths.sum()),
            num_supervised=int(self.supervised[rows].sum()),
            num_empty=int((self.supervised[rows] == 0).sum()),
            num_turns=int(self.turns[rows].sum()),
            num_unfinished=int(self.unfinished[rows].sum()),
            num_stopped=int(self.stopped[rows].sum()),
            num_double_bos=int(self.double_bos[rows].sum()),
            num_duplicates=int(self.duplicate[rows].sum()),
            num_seen=int(self.seen[rows].sum()),
            num_asked=int(self.asked[rows].sum()),
            shortest=shortest,
            median=median,
            longest=longest,
        )


def supervised_turns(labels: list[int]) -> list[tuple[int, int]]:
    """Return the first index of each run of supervised tokens, and the one after its last."""
    import numpy as np

    # The label added at both ends gives every run two edges.
    is_supervised = np.array([IGNORE_INDEX, *labels, IGNORE_INDEX]) != IGNORE_INDEX
    edges = np.flatnonzero(is_supervised[1:] != is_supervised[:-1]).tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))


def _number(digest: bytes) -> int:
    # Zero means a row without a prompt.
    return int.from_bytes(digest, "little") or 1


def _look_up(wanted: NDArray[np.uint64], known: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Return the first place of each number among the known ones; -1 for zero or not found."""
    import numpy as np

    values, places = np.unique(known, return_index=True)
    if not len(values):
        return np.full(len(wanted), -1)
    at = np.minimum(np.searchsorted(values, wanted), len(values) - 1)
    return np.where((values[at] == wanted) & (wanted != 0), places[at], -1)


def _first_pairs(others: NDArray[np.int64]) -> list[tuple[int, int]]:
    import numpy as np

    return [(int(row), int(others[row])) for row in np.flatnonzero(others >= 0)[:NAMED]]


def _bars(lengths: NDArray[np.uint32]) -> list[LengthBar]:
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
