"""Scan prepared rows for their statistics.

Every figure comes from the tokens and labels that the model will see, and not from what the rows
were meant to become. One pass takes time linear in the tokens and keeps a few hashes and lengths
per row.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qlora_cli.data.prepared.statistics import (
    NAMED,
    DatasetStatistics,
    LocatedExamples,
    StatisticsColumns,
    length_bars,
)
from qlora_cli.types import IGNORE_INDEX, Example

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerFast


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


@dataclass(frozen=True, slots=True)
class _ScannedExample:
    """Counts and hashes of one example."""

    length: int
    supervised: int
    turns: int
    unfinished: int
    stopped: int
    has_double_bos: bool
    digest: int
    prompts: list[int]
    """Hashes of the prompts of its supervised turns: of all tokens before each."""


class DatasetScan:
    """Counts and 8-byte hashes of training or evaluation rows.

    A pair of linked examples is one row.

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
        self._num_examples = 0
        # Per row.
        self._firsts = array("Q")
        self._sources = array("I")
        self._lengths = array("I")
        self._tokens = array("Q")
        self._supervised = array("I")
        self._turns = array("I")
        self._unfinished = array("I")
        self._stopped = array("I")
        self._double_bos = array("B")
        self._hashes = array("Q")
        self._values = array("Q")
        self._last_prompts = array("Q")
        # Per row, zero unless it is a pair: hash with the answers swapped, and comparisons.
        self._swapped = array("Q")
        self._equal = array("B")
        self._longer = array("b")
        self._pairs = array("B")
        # Per supervised turn: its prompt is everything before it.
        self._prompts = array("Q")
        self._prompt_rows = array("Q")
        self._ends: Counter[int] = Counter()

    def add(self, example: Example, source: int = 0) -> None:
        """Add the next example: a row, or the second answer of a pair.

        Args:
            source: index of its source.
        """
        self._num_examples += 1
        found = self._scan(example)
        if example.is_linked:
            self._join(found)
            return
        row = len(self._hashes)
        self._firsts.append(self._num_examples - 1)
        self._sources.append(source)
        self._lengths.append(found.length)
        self._tokens.append(found.length)
        self._supervised.append(found.supervised)
        self._turns.append(found.turns)
        self._unfinished.append(found.unfinished)
        self._stopped.append(found.stopped)
        self._double_bos.append(found.has_double_bos)
        self._hashes.append(found.digest)
        self._values.append(_number(_digest(array("d", example.values))))
        self._last_prompts.append(found.prompts[-1] if found.prompts else 0)
        self._prompts.extend(found.prompts)
        self._prompt_rows.extend([row] * len(found.prompts))
        for column in (self._swapped, self._equal, self._longer, self._pairs):
            column.append(0)

    def _scan(self, example: Example) -> _ScannedExample:
        ids = example.input_ids
        turns = supervised_turns(example.labels)
        tokens = array("I", ids)
        digest = hashlib.blake2b(digest_size=8)
        at = num_cut = num_stopped = 0
        prompts = []
        for first, after in turns:
            digest.update(tokens[at:first])
            at = first
            # One token is not a prompt: it is a BOS, or the last token of the piece before.
            if first > 1:
                prompts.append(_number(digest.digest()))
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
        return _ScannedExample(
            length=len(ids),
            # The first token of a row has no predecessor to be predicted from.
            supervised=sum(after - max(1, first) for first, after in turns),
            turns=len(turns),
            unfinished=num_cut,
            stopped=num_stopped,
            has_double_bos=self._bos is not None and ids[:2] == [self._bos] * 2,
            digest=_number(digest.digest()),
            prompts=prompts,
        )

    def _join(self, rejected: _ScannedExample) -> None:
        """Make a pair of the last row: its answer was the chosen one, and this is the other."""
        chosen, length = self._hashes[-1], self._lengths[-1]
        self._pairs[-1] = 1
        self._equal[-1] = chosen == rejected.digest
        self._longer[-1] = (length > rejected.length) - (length < rejected.length)
        self._lengths[-1] = max(length, rejected.length)
        self._tokens[-1] += rejected.length
        self._supervised[-1] += rejected.supervised
        self._turns[-1] += rejected.turns
        self._unfinished[-1] += rejected.unfinished
        self._stopped[-1] += rejected.stopped
        self._double_bos[-1] |= rejected.has_double_bos
        self._hashes[-1] = _number(_digest(array("Q", [chosen, rejected.digest])))
        if chosen != rejected.digest:
            self._swapped[-1] = _number(_digest(array("Q", [rejected.digest, chosen])))

    def first_rows(self, source: int, count: int | None) -> list[int]:
        """Return the first example of each of the first rows of a source; None takes all rows."""
        import numpy as np

        rows = np.flatnonzero(np.array(self._sources) == source)[:count]
        examples: list[int] = np.array(self._firsts)[rows].tolist()
        return examples

    def longer_than(self, length: int) -> list[int]:
        """Return the first example of each row with more than `length` tokens."""
        import numpy as np

        examples: list[int] = np.array(self._firsts)[np.array(self._lengths) > length].tolist()
        return examples

    def audit(self, training: DatasetScan | None = None) -> DatasetStatistics:
        """Compute the statistics.

        Args:
            training: the scan of the training rows, if these are evaluation rows.
        """
        import numpy as np

        hashes, swapped = np.array(self._hashes), np.array(self._swapped)
        numbers = np.arange(len(hashes))
        _, first_rows, which = np.unique(hashes, return_index=True, return_inverse=True)
        earliest = first_rows[which]
        is_duplicate = earliest != numbers
        values = np.array(self._values)
        relabelled = np.where(is_duplicate & (values != values[earliest]), earliest, -1)
        reversed_of = _look_up(swapped, hashes)
        reversed_of = np.where(is_duplicate | (reversed_of > numbers), -1, reversed_of)
        seen = asked = np.full(len(hashes), -1)
        if training is not None:
            known = np.array(training._hashes)
            seen = _look_up(hashes, known)
            seen = np.where(seen < 0, _look_up(swapped, known), seen)
            prompts = _look_up(np.array(self._last_prompts), np.array(training._prompts))
            # -1 (not found) picks the -1 appended at the end.
            rows = np.append(np.array(training._prompt_rows, np.int64), -1)
            asked = np.where(seen < 0, rows[prompts], -1)
        longer = np.array(self._longer)
        table = StatisticsColumns(
            source=np.array(self._sources),
            length=np.array(self._lengths),
            tokens=np.array(self._tokens),
            supervised=np.array(self._supervised),
            turns=np.array(self._turns),
            unfinished=np.array(self._unfinished),
            stopped=np.array(self._stopped),
            double_bos=np.array(self._double_bos),
            duplicate=is_duplicate,
            seen=seen >= 0,
            asked=asked >= 0,
            relabelled=relabelled >= 0,
            pairs=np.array(self._pairs),
            equal=np.array(self._equal),
            swapped=reversed_of >= 0,
            longer_chosen=longer > 0,
            longer_rejected=longer < 0,
        )
        others = self if training is None else training
        return DatasetStatistics(
            total=table.figures(np.full(len(hashes), True)),
            sources=[table.figures(table.source == i) for i in np.unique(table.source)],
            bars=length_bars(table.length),
            ends=dict(self._ends.most_common()),
            duplicates=self._first_pairs(np.where(is_duplicate, earliest, -1)),
            seen=self._first_pairs(seen, others),
            asked=self._first_pairs(asked, others),
            relabelled=self._first_pairs(relabelled),
            equal=[self._firsts[row] for row in np.flatnonzero(table.equal)[:NAMED]],
            swapped=self._first_pairs(reversed_of),
        )

    def _first_pairs(
        self, found: NDArray[np.int64], others: DatasetScan | None = None
    ) -> list[tuple[int, int]]:
        """Return the first rows with a row that was found for them, by their first examples."""
        import numpy as np

        known = (others or self)._firsts
        rows = np.flatnonzero(found >= 0)[:NAMED]
        return [(self._firsts[row], known[int(found[row])]) for row in rows]


def supervised_turns(labels: list[int]) -> list[tuple[int, int]]:
    """Return the first index of each run of supervised tokens, and the one after its last."""
    import numpy as np

    # The label added at both ends gives every run two edges.
    is_supervised = np.array([IGNORE_INDEX, *labels, IGNORE_INDEX]) != IGNORE_INDEX
    edges = np.flatnonzero(is_supervised[1:] != is_supervised[:-1]).tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))


def _digest(numbers: array[int] | array[float]) -> bytes:
    return hashlib.blake2b(numbers.tobytes(), digest_size=8).digest()


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
