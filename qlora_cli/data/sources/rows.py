"""Rows with their places, those that cannot be used, and drawing by lot."""

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
    """For messages to the user: `train.jsonl:17`, or `train.parquet, row 17`."""


class BadRows:
    """Rows that cannot be used: all are counted, the first are kept so that the user sees them."""

    def __init__(self, *, keep: int = _SHOWN) -> None:
        self.count = 0
        self.first: list[str] = []
        """What is wrong with the first of them, with the place of each."""
        self._keep = keep

    def add(self, place: str, reason: object) -> None:
        self.count += 1
        if len(self.first) < self._keep:
            self.first.append(f"{place}: {reason}")

    def check(self, path: str, *, skip: bool = False) -> None:
        """Report the bad rows, if there are any: their number and the first ten.

        Args:
            skip: warn of them in the log, in place of raising.

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
        """How many they are and what became of them, and the first ten."""
        head = f"{path}: {counted(self.count, 'bad row')}{what}"
        return f"{head}\n{first_lines(self.first, self.count)}"


def counted(number: int, noun: str) -> str:
    """`1 row`, `2 rows`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def first_lines(lines: list[str], count: int | None = None) -> str:
    """The first ten lines, indented, and how many there are beyond them.

    Args:
        count: how many there are in all, if `lines` are but the first.
    """
    shown = [f"  {line}" for line in lines[:_SHOWN]]
    more = (len(lines) if count is None else count) - len(shown)
    if more:
        shown.append(f"  ... and {more:,} more")
    return "\n".join(shown)


def draw(row: object, purpose: str, seed: int) -> float:
    """A number from 0 to 1 that depends on what a row says, and neither on its place nor order.

    Args:
        purpose: draws for different purposes are independent of each other.
    """
    content = json.dumps(row, sort_keys=True, default=str)
    digest = hashlib.blake2b(f"{purpose} {seed} {content}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) / 2**64


def shuffled(rows: Iterable[LocatedRow], seed: int, limit: int | None) -> Iterator[LocatedRow]:
    """The first `limit` rows in an order that is drawn; no more than these are held in memory."""
    if limit is not None:
        yield from heapq.nsmallest(limit, rows, key=lambda located: _rank(located, seed))
        return
    # All rows may be more than memory holds: they wait on the disk, and a few bytes of each here.
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
    """Rows as lines of JSON, and back.

    What JSON has no form for (the dates and bytes of parquet files) waits in memory, and the line
    says where. A tuple becomes a list.
    """

    def __init__(self) -> None:
        self._aside: list[object] = []
        # A key that no row has, so that nothing in a row is taken for such a reference.
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
