"""Rows with their places, bad rows, and random draws."""

from __future__ import annotations

import hashlib
import heapq
import json
import logging
import re
import tempfile
import uuid
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from qlora_cli.data.sources.repair import Repair
from qlora_cli.errors import DataError
from qlora_cli.types import Row

log = logging.getLogger("qlora")

LIST_ALL = "qlora preview RECIPE --bad-rows bad.jsonl"
"""The command that writes all bad rows; the command line fills in the recipe and its overrides."""
_SHOWN = 10
_FEW = 3
"""Bad rows that are shown without counting their reasons."""


@dataclass(frozen=True, slots=True)
class LocatedRow:
    """A row and where it was read."""

    row: Row
    place: str
    """The place for messages to the user: `train.jsonl:17`, or `train.parquet, row 17`."""
    repaired: tuple[str, ...] = ()
    """The repairs (`data.repair`) that changed the row."""


class BadRows:
    """Rows that cannot be used: all are counted by reason, and the first ones kept for the report.

    Args:
        keep: number of rows to keep in `first`.
        write: is given the place and the reason of every row.
        tries_repairs: find the repairs that make rows usable, for an error. They are tried on each
            row, which doubles the time that it takes to read.
    """

    def __init__(
        self,
        *,
        keep: int = _SHOWN,
        write: Callable[[str, str], None] | None = None,
        tries_repairs: bool = True,
    ) -> None:
        self.count = 0
        self.tries_repairs = tries_repairs
        self.template = TEMPLATE
        """Recipe keys that read the columns with a template, for a hint; "" if none do."""
        self.first: list[str] = []
        """Place and problem of the first of them."""
        self._keep = keep
        self._write = write
        self.repaired: Counter[str] = Counter()
        """The number of used rows that each repair (`data.repair`) changed."""
        self.num_swallowed = 0
        """Lines that a quotation mark made part of a bad row of a CSV file."""
        self._num_repairable = 0
        """Bad rows that further repairs would make usable."""
        self._helpful: set[str] = set()
        """All repairs that these rows need."""
        self._reasons: Counter[str] = Counter()
        """The number of rows for each reason, without what differs from row to row."""
        self._examples: dict[str, list[str]] = {}
        """Place and problem of the first rows of each reason."""

    def add(self, place: str, reason: object, repairs: Sequence[str] = ()) -> None:
        """Count a row, and keep it if it is among the first, or the first of its reason.

        Args:
            repairs: make the row usable.
        """
        kind = _kind(str(reason))
        if kind not in self._reasons and len(self._reasons) >= _MAX_REASONS:
            kind = "other reasons"
        self.count += 1
        self._reasons[kind] += 1
        self.num_swallowed += _num_swallowed(str(reason))
        self._num_repairable += bool(repairs)
        self._helpful.update(repairs)
        line = f"{place}: {reason}"
        if len(self.first) < self._keep:
            self.first.append(line)
        if self._reasons[kind] <= _SHOWN:
            self._examples.setdefault(kind, []).append(line)
        if self._write is not None:
            self._write(place, str(reason))

    def extend(self, others: BadRows) -> None:
        """Add the rows of another count."""
        self.count += others.count
        self.first += others.first
        self._reasons += others._reasons
        self.num_swallowed += others.num_swallowed
        self._num_repairable += others._num_repairable
        self._helpful |= others._helpful
        for kind, lines in others._examples.items():
            self._examples.setdefault(kind, []).extend(lines)

    @property
    def has_more(self) -> bool:
        """Tell whether there are more bad rows than a report shows."""
        return self.count > _SHOWN

    @property
    def has_wrong_fields(self) -> bool:
        """Tell whether a record of a table has another number of fields than the header."""
        return self._num_matching(_WRONG_FIELDS) > 0

    def check(self, path: str, *, skip: bool = False, is_listed: bool = False) -> None:
        """Report the bad rows, if there are any: the number for each reason, and the first ten.

        Args:
            skip: log a warning instead of raising.
            is_listed: `qlora preview --bad-rows` reads these rows.

        Raises:
            DataError: there are bad rows.
        """
        if self.repaired:
            log.info("%s: repaired %s", path, repaired_text(self.repaired))
        if not self.count:
            return
        if skip:
            log.warning("%s", self.report(path, ", left out"))
            return
        hint = self.remedy("leave {them} out with data.on_bad_row: skip")
        if self.has_more and is_listed:
            hint += f"; {LIST_ALL} writes all of them"
        raise DataError(self.report(path), hint=hint)

    def report(self, path: str, what: str = "") -> str:
        """Return their number, what became of them, the reasons by number, and the first ten."""
        lines = [f"{path}: {counted(self.count, 'bad row')}{what}{self._swallowed}"]
        ranked = self._reasons.most_common()
        # A few rows, or one of each reason, are all there is to say.
        if self.count <= _FEW or ranked[0][1] == 1:
            return "\n".join([*lines, first_lines(self.first, self.count)])
        lines += [f"  {number:,} x {kind}" for kind, number in ranked[:_SHOWN]]
        if len(ranked) > _SHOWN:
            rest = sum(number for _, number in ranked[_SHOWN:])
            lines.append(f"  {rest:,} x {len(ranked) - _SHOWN:,} other reasons")
        of_each = max(1, _SHOWN // len(ranked))
        examples = [line for kind, _ in ranked for line in self._examples[kind][:of_each]]
        return "\n".join([*lines, "such as", first_lines(examples, self.count)])

    @property
    def _swallowed(self) -> str:
        return f"; {swallowed_text(self.num_swallowed)}" if self.num_swallowed else ""

    def remedy(self, otherwise: str) -> str:
        """Name the settings that make rows usable, with their number, and say what remains to do.

        Args:
            otherwise: can be done instead of repairing the remaining `{them}`.
        """
        ways = sorted(self._ways_out(), key=lambda way: -way[1])
        left = self.count - sum(number for _, number in ways)
        named = [
            text if number == self.count else f"{text} ({number:,} of {self.count:,} rows)"
            for text, number in ways
        ]
        if not ways:
            rest = "repair them"
        elif left <= 0:
            rest = "or repair them"
        else:
            rest = (
                "repair the remaining row" if left == 1 else f"repair the remaining {left:,} rows"
            )
        them = "it" if ways and left == 1 else "them"
        return "; ".join([*named, f"{rest}, or {otherwise.format(them=them)}"])

    def _ways_out(self) -> Iterator[tuple[str, int]]:
        """Yield settings that make rows usable, and the number of rows that each helps."""
        if self._num_repairable:
            needed = [repair for repair in get_args(Repair) if repair in self._helpful]
            yield f"data.repair: [{', '.join(needed)}]", self._num_repairable
        if number := self._num_matching(_OMITTED_TOOLS):
            yield _TOOL_TEMPLATE, number
        if number := self._num_matching(_SWALLOWED):
            yield _CLOSE_QUOTES, number
        if number := self._num_matching(_TOO_MANY_FIELDS):
            yield _QUOTE_FIELDS, number
        # Another format affects all rows, so that it has to help most of them.
        number = self._num_matching(_NUMBER_AS_TEXT)
        if self.template and 2 * number > self.count:
            yield f"{self.template} writes numbers as text", number

    def _num_matching(self, pattern: str) -> int:
        return sum(n for kind, n in self._reasons.items() if re.search(pattern, kind))


_MAX_REASONS = 1000
_TYPE_AND_RULE = r"(?: \(\w+\))?, (?:expected|which) "
# In this order. The name of a field and the type of a value stay, and values and numbers do not:
# `field 'messages[3].content': got 7 (int)` becomes `field messages[..].content: got .. (int)`.
_VARIES = [
    (re.compile(r"field '([^']*)'"), r"field \1"),
    (
        re.compile(rf"\bgot (JSON text )?(?!null).*?({_TYPE_AND_RULE})"),
        r"got \1..\2",
    ),
    (re.compile(r"missing; found .*"), "missing"),
    (re.compile(r"'[^']*'|\"[^\"]*\""), "'..'"),
    (re.compile(r"(?<![-\w])\d[\d,]*\b"), ".."),
]


def _kind(reason: str) -> str:
    """Return a reason without what differs from row to row."""
    for pattern, instead in _VARIES:
        reason = pattern.sub(instead, reason)
    return reason


_OMITTED_TOOLS = (
    r"chat template omits (the tools|'\.\.' from its tool calls)"
    r"|\(tool\): the chat template changes or omits its content"
)
_TOOL_TEMPLATE = (
    "data.chat_template: configs/chat_templates/chatml-tools.jinja writes tools and calls"
)
_SWALLOWED = "; a quotation mark opens a field in line"
_SWALLOWED_LINES = re.compile(rf"{_SWALLOWED} \d+ and swallows the next (?:line|([\d,]+) lines),")
_CLOSE_QUOTES = 'close each quoted field, and write a quotation mark inside one twice ("")'
_WRONG_FIELDS = "fields, but (the header has|there are columns for)"
_TOO_MANY_FIELDS = "; fields are delimited by '..' outside of quotation marks"
_QUOTE_FIELDS = (
    'put each field that contains the delimiter in quotation marks ("a, b"), or name another '
    "delimiter in data.train.delimiter"
)
_NUMBER_AS_TEXT = r"field [^\s.]+: got \.\. \((int|float|bool)\), expected text"
TEMPLATE = 'data.train.format: {type: template, user: "{{ COLUMN }}", assistant: "{{ COLUMN }}"}'
"""A template over columns whose names are unknown."""


def _num_swallowed(reason: str) -> int:
    """Return the number of lines that a reason says were swallowed."""
    found = _SWALLOWED_LINES.search(reason)
    return int((found[1] or "1").replace(",", "")) if found else 0


def swallowed_text(number: int) -> str:
    """Say that lines are lost to quotation marks: `39 further lines swallowed by ...`."""
    return f"{counted(number, 'further line')} swallowed by quotation marks"


def repaired_text(repaired: Mapping[str, int]) -> str:
    """List repairs, with the number of used rows that each changed: `role_names (7)`."""
    return ", ".join(f"{name} ({count:,})" for name, count in repaired.items())


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
