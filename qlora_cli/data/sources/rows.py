"""Rows with their places, bad rows, and random draws."""

from __future__ import annotations

import hashlib
import heapq
import json
import logging
import tempfile
import uuid
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from qlora_cli.errors import DataError
from qlora_cli.types import Row

log = logging.getLogger("qlora")

_SHOWN = 10


@dataclass(frozen=True, slots=True)
class LocatedRow:
    """A row and where it was read."""

    row: Row
    place: str
    """The place for messages to the user: `train.jsonl:17`, or `train.parquet, row 17`."""


class BadRows:
    """Rows that cannot be used: all are counted, and the first ones are kept for the report."""

    def __init__(self, *, keep: int = _SHOWN) -> None:
        self.count = 0
        self.first: list[str] = []
        """Place and problem of the first of them."""
        self._keep = keep

    def add(self, place: str, reason: object) -> None:
        self.count += 1
        if len(self.first) < self._keep:
            self.first.append(f"{place}: {reason}")

    def check(self, path: str, *, skip: bool = False) -> None:
        """Report the bad rows, if there are any: their number and the first ten.

        Args:
            skip: log a warning instead of raising.

        Raises:
            DataError: there are bad rows.
        """
        if not self.count:
            return
        if skip:
            log.warning("%s", self.report(path, ", left out"))
            return
        hint = "repair them, or leave them out with data.on_bad_row: skip"
        raise DataError(self.report(path), hint=hint)

    def report(self, path: str, what: str = "") -> str:
        """Return their number, what became of them, and the first ten."""
        head = f"{path}: {counted(self.count, 'bad row')}{what}"
        return f"{head}\n{first_lines(self.first, self.count)}"


def counted(number: int, noun: str) -> str:
    """Return a count with its noun: `1 row`, `2 rows`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def first_lines(lines: list[str], count: int | None = None) -> str:
    """Return the first ten lines, indented, and the number of further ones.

    Args:
        count: the total, if `lines` are only the first.
    """
    shown = [f"  {line}" for line in lines[:_SHOWN]]
    more = (len(lines) if count is None else count) - len(shown)
    if more:
        shown.append(f"  ... and {more:,} more")
    return "\n".join(shown)


def draw(row: object, purpose: str, seed: int) -> float:
    """Draw a number from 0 to 1 that depends on a row's content, and not on its place or order.

    Args:
        purpose: draws for different purposes are independent.
    """
    content = json.dumps(row, sort_keys=True, default=str)
    digest = hashlib.blake2b(f"{purpose} {seed} {content}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) / 2**64


def shuffled(rows: Iterable[LocatedRow], seed: int, limit: int | None) -> Iterator[LocatedRow]:
    """Yield the first `limit` rows of a shuffled order. No more than these are held in memory."""
    if limit is not None:
        yield from heapq.nsmallest(limit, rows, key=lambda located: _rank(located, seed))
        return
    # All rows may not fit in memory: they wait on disk, and only a few bytes of each are kept.
    ranks, offsets = array("d"), array("Q")
    codec = _Codec()
    with tempfile.TemporaryFile() as file:
        for located in rows:
            ranks.append(_rank(located, seed))
            offsets.append(file.tell())
            file.write(codec.to_line(located))
        for i in sorted(range(len(ranks)), key=ranks.__getitem__):
            file.seek(offsets[i])
            yield codec.from_line(file.readline())


class _Codec:
    """Converts rows to lines of JSON and back.

    Values that JSON cannot hold (dates and bytes in Parquet files) stay in memory, and the line
    refers to them. A tuple becomes a list.
    """

    def __init__(self) -> None:
        self._aside: list[object] = []
        # A key that no row has, so that nothing in a row looks like such a reference.
        self._key = uuid.uuid4().hex

    def to_line(self, located: LocatedRow) -> bytes:
        text = json.dumps([located.place, located.row], default=self._set_aside)
        return f"{text}\n".encode()

    def from_line(self, line: bytes) -> LocatedRow:
        place, row = json.loads(line, object_hook=self._fetch if self._aside else None)
        return LocatedRow(row, place)

    def _set_aside(self, value: object) -> dict[str, int]:
        self._aside.append(value)
        return {self._key: len(self._aside) - 1}

    def _fetch(self, found: dict[str, Any]) -> object:
        return self._aside[found[self._key]] if self._key in found else found


def _rank(located: LocatedRow, seed: int) -> float:
    return draw(located.row, "shuffle", seed)
