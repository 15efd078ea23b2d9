"""Count what becomes of the rows of a source, and refuse too many lost answers."""

from __future__ import annotations

import logging
from array import array
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from qlora_cli.data.encode.truncate import EncodedRow
from qlora_cli.data.formats import Text, is_verbatim
from qlora_cli.data.sources import BadRows, Source, first_lines
from qlora_cli.errors import DataError
from qlora_cli.types import Conversation, ModelContext

if TYPE_CHECKING:
    from qlora_cli.data.config import Data

log = logging.getLogger("qlora")

MIN_STOPPED = 0.99
"""Minimum share of supervised turns that end in a stop token. With fewer, the tuned model would not
stop."""


class TooManyLost(DataError):
    """More answers are cut or left out than `data.max_lost` allows."""


class Tally:
    """Counts of what became of the rows of one source."""

    def __init__(self, source: Source, data: Data, context: ModelContext | None) -> None:
        self._path = source.path
        self._rows = source.rows_are
        self._data = data
        self._context = context
        self._is_verbatim = is_verbatim(source.format)
        self.is_text = isinstance(source.format, Text)
        rows = source.format.rows
        self.supervised_as = {"pairs": "pairs", "labels": "labelled texts"}.get(rows, "answers")
        """The word for what is learned of a row in messages to the user."""
        self._has_stops = rows != "labels"
        self.counts: Counter[str] = Counter()
        self.longest = 0
        self.turn_ends: Counter[tuple[int, ...] | str] = Counter()
        """Number of supervised turns that end in the same added tokens, or in other text."""
        self.ignored: Counter[str] = Counter()
        """Message keys that are not read, and the number of messages with each."""
        self.repaired: Counter[str] = Counter()
        """The number of used rows that each repair changed."""
        self.contradicted: list[str] = []
        """Places of pairs whose rejected answer has the higher score."""
        self._lost = BadRows()
        self._num_saved = 0
        """Rows with lost answers that `truncate: cut_prompt` would keep."""
        self._lengths = array("I")

    def add(self, conversation: Conversation, row: EncodedRow) -> None:
        """Count a row."""
        max_length = self._data.max_length
        self._lengths.append(row.length)
        self.counts.update(
            num_rows=1,
            num_lost=not row.examples,
            num_truncated=row.length > max_length,
            num_answers=row.num_answers,
            num_lost_answers=row.num_lost,
            num_typed=row.is_typed,
            num_with_tools=bool(row.examples and conversation.tools),
            num_scored=bool(row.examples and conversation.margin is not None),
            num_tokens=sum(len(example.input_ids) for example in row.examples),
            num_supervised=sum(example.num_supervised for example in row.examples),
        )
        self.longest = max([self.longest, *(len(one.input_ids) for one in row.examples)])
        if row.examples:
            self.repaired.update(conversation.repaired)
            if conversation.margin is not None and conversation.margin < 0:
                self.counts["num_contradicted"] += 1
                self.contradicted.append(conversation.place)
        if self._has_stops:
            self.turn_ends.update(end.token_ids or end.text for end in row.turn_ends)
        if row.lost is not None:
            self._num_saved += row.is_saved_by_prompt
            what = "cut" if row.examples else "left out"
            length = f"{row.length:,} tokens, data.max_length {max_length:,}"
            self._lost.add(conversation.place, f"{length}: {what}" if self.is_text else row.lost)

    @property
    def num_kept(self) -> int:
        """The number of rows that are not left out."""
        return self.counts["num_rows"] - self.counts["num_lost"]

    def check(self) -> None:
        """Warn of lost answers, or refuse them, and refuse turns without a stop token.

        Raises:
            DataError: more are lost than `data.max_lost` allows, or too few turns end.
        """
        self.check_lost()
        if self._has_stops:
            self._check_stops()

    def check_lost(self) -> None:
        """Warn of lost answers, or raise TooManyLost."""
        counts, max_lost = self.counts, self._data.max_lost
        if not self._lost.count:
            return
        what = "texts are cut or left out" if self.is_text else f"{self.supervised_as} are lost"
        message = (
            f"{self._path}: {counts['num_lost_answers']:,} of {counts['num_answers']:,} {what}, "
            f"in {self._lost.count:,} of {counts['num_rows']:,} {self._rows}"
        )
        shown = first_lines(self._lost.first, self._lost.count)
        is_empty = counts["num_lost"] == counts["num_rows"]
        if counts["num_lost_answers"] > max_lost * counts["num_answers"] or is_empty:
            raise TooManyLost(
                f"{message}; data.max_lost allows {max_lost:.1%}\n{shown}",
                hint="; or ".join(
                    [
                        *self._remedies(),
                        "shorten or repair the rows",
                        *([] if is_empty else ["raise data.max_lost"]),
                    ]
                ),
            )
        log.warning("%s\n%s", message, shown)

    def _remedies(self) -> Iterator[str]:
        """Yield settings that would keep rows that are too long, if there are any."""
        lengths, now = sorted(self._lengths), self._data.max_length
        if lengths[-1] <= now:
            return
        most = lengths[-(len(lengths) // 100) - 1]
        also = f", {most} keeps 99 %" if now < most < lengths[-1] else ""
        if self._context is None or lengths[-1] <= self._context.length:
            yield f"data.max_length: {lengths[-1]} keeps every row whole{also}"
        elif max(now, lengths[0] - 1) < self._context.length:
            share = sum(length <= self._context.length for length in lengths) / len(lengths)
            context = f"{self._context.length}, the model's context, keeps {share:.1%} of the rows"
            yield f"data.max_length: {context} whole"
        if self._is_verbatim:
            yield "data.truncate: split makes several rows of a long text"
        elif self._num_saved and self._data.truncate != "cut_prompt":
            some = f" of {self._num_saved:,} of these rows"
            which = "" if self._num_saved == self._lost.count else some
            yield (
                f"data.truncate: cut_prompt cuts the beginning of the prompt{which} (system "
                "message and tools first), so that answers stay"
            )

    def _check_stops(self) -> None:
        num_ends = self.turn_ends.total()
        if not num_ends:
            log.warning("%s: every row is cut, so the model never sees where to stop", self._path)
        unstopped = Counter({end: n for end, n in self.turn_ends.items() if isinstance(end, str)})
        if unstopped.total() > (1 - MIN_STOPPED) * num_ends:
            [(follows, _)] = unstopped.most_common(1)
            raise DataError(
                f"{self._path}: {unstopped.total():,} of {num_ends:,} supervised turns do not end "
                "in an added token, so the tuned model would not know where to stop; after the "
                f"content comes {follows!r}",
                hint="name a template in data.chat_template that ends assistant turns with a "
                "special token of the tokenizer",
            )
