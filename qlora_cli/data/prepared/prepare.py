"""Prepare a dataset: encode, count and check all rows of some sources, and store them."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_cli.common.formatting import first_names, shortened
from qlora_cli.common.hashing import hash_text
from qlora_cli.data.encode.encoder import Encoder, RefusedRow
from qlora_cli.data.encode.truncate import EncodedRow
from qlora_cli.data.prepared.first_rows import check_bad_rows, none_usable
from qlora_cli.data.prepared.labels import LabelCounter
from qlora_cli.data.prepared.mmap_dataset import (
    DatasetWriter,
    MmapDataset,
    damaged_file,
    read_facts,
)
from qlora_cli.data.prepared.statistics import NAMED
from qlora_cli.data.prepared.tally import Tally
from qlora_cli.data.prepared.tool_calls import ToolCallAudit
from qlora_cli.data.prepared.workers import Workers
from qlora_cli.data.sources import BadRows, Portion, Source, counted
from qlora_cli.data.sources.row_kinds import refuse_without_answers
from qlora_cli.data.sources.rows import swallowed_text
from qlora_cli.errors import DataError
from qlora_cli.objectives import SUPERVISED, ObjectiveSettings
from qlora_cli.types import Conversation, ModelContext, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from qlora_cli.data.config import Data

log = logging.getLogger("qlora")


@dataclass(frozen=True, slots=True)
class PreparedData:
    """The examples of some sources, and counts of what became of their rows."""

    examples: MmapDataset
    paths: list[str]
    """The paths of the sources."""
    counts: list[dict[str, int]]
    """The counts below, for each source."""
    stop_token_ids: list[int]
    """Tokens that end supervised turns; generation has to stop at them."""
    stops: list[str]
    """The stop tokens as text."""
    num_rows: int
    """Usable rows that were read."""
    num_bad: int
    """Bad rows that were left out (`data.on_bad_row: skip`)."""
    num_swallowed: int
    """Further lines of CSV files that an unclosed quotation mark made part of these bad rows."""
    num_lost: int
    """Rows left out because of their length, or because no supervised token was left."""
    num_truncated: int
    """Rows longer than `data.max_length`, including those left out."""
    num_answers: int
    """Supervised turns in all rows."""
    num_lost_answers: int
    """Supervised turns that were cut, in whole or in part."""
    ignored: list[dict[str, int]]
    """For each source: message keys that are not read, and the number of messages with each."""
    repaired: list[dict[str, int]]
    """For each source: repairs (`data.repair`), and the number of used rows that each changed."""
    tool_problems: dict[str, int]
    """The number of used rows with each problem of tool calls."""
    tool_problem_places: dict[str, list[str]]
    """The places of the first rows with each problem."""
    labels: dict[str, int]
    """The number of rows with each answer, if the answers are labels."""
    supervised_as: str
    """The word for supervised turns in messages to the user: answers, or texts."""
    num_typed: int
    """Rows with special tokens in their messages, which are encoded as plain text."""
    num_with_tools: int
    """Rows that declare tools."""
    num_scored: int
    """Pairs with scores or a margin."""
    num_contradicted: int
    """Pairs whose rejected answer has the higher score."""
    contradicted_places: list[str]
    """The places of the first of these pairs."""
    num_tokens: int
    num_supervised: int
    longest: int
    """Tokens of the longest example."""
    digest: str
    """sha256 of the sources."""
    rows_digest: str
    """sha256 of the examples: their tokens, loss masks, sources and links, in order."""

    @classmethod
    def open(cls, folder: Path) -> PreparedData | None:
        """Open what `prepare` wrote to a folder. Returns None if any byte of it differs."""
        facts = read_facts(folder)
        names = {_key_of(field.name): field.name for field in fields(cls)}
        del names["examples"]
        if facts is None or facts.keys() != names.keys() or damaged_file(folder):
            return None
        return cls(examples=MmapDataset(folder), **{names[k]: v for k, v in facts.items()})

    @classmethod
    def open_written(cls, folder: Path) -> PreparedData:
        """Open what was written to a folder just now.

        Raises:
            DataError: it is not read back as it was written.
        """
        prepared = cls.open(folder)
        if prepared is None:
            raise DataError(
                f"{folder}: {damaged_file(folder)} is read back otherwise than it was written: the "
                "disk is faulty",
                hint="name a folder on another disk in QLORA_CACHE (with --no-cache: in TMPDIR)",
            )
        return prepared

    def summary(self) -> str:
        """Summarize the data in one line for the log."""
        answers = f", {self.num_lost_answers:,} of {self.num_answers:,} {self.supervised_as} lost"
        typed = f", {self.num_typed:,} with special tokens as text" if self.num_typed else ""
        bad = f", {counted(self.num_bad, 'bad row')} left out" if self.num_bad else ""
        bad += f" and {swallowed_text(self.num_swallowed)}" if self.num_swallowed else ""
        return (
            f"{counted(self.num_rows, 'row')} "
            f"({self.num_truncated:,} too long, {self.num_lost:,} left out"
            f"{answers if self.num_lost_answers else ''}){bad}{typed}, "
            f"{self.num_tokens:,} tokens{self._supervised()}"
        )

    def _supervised(self) -> str:
        """Say how much is supervised; of a labelled row, the last token is read and no other."""
        longest = f"longest {self.longest:,}"
        if self.supervised_as == "labelled texts":
            return f", {longest}; the last token of each row is read"
        share = self.num_supervised / self.num_tokens
        stops = " ".join(self.stops) or "nothing"
        return f", {share:.1%} of them supervised, {longest}; turns end with {stops}"

    def record(self) -> dict[str, Any]:
        """Return everything except texts of the rows, for the record of the run."""
        names = [one.name for one in fields(self) if one.name not in ("examples", "labels")]
        return {_key_of(name): getattr(self, name) for name in names}


def _key_of(name: str) -> str:
    """Return the key of a field in the files; one has the name that earlier versions wrote."""
    return "learnt_as" if name == "supervised_as" else name


def prepare(
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerFast,
    data: Data,
    folder: Path,
    *,
    digests: Sequence[str] | None = None,
    context: ModelContext | None = None,
    objective: ObjectiveSettings = SUPERVISED,
) -> PreparedData:
    """Read, format, encode and check all rows of some sources, and write them to a folder.

    Args:
        digests: the digest of each source, if already known.
        context: that of the model; no longer row is advised.
        objective: gives the values of each row.

    Raises:
        DataError: there are no rows, bad rows (all are counted), too many lost answers, turns that
            do not end in a stop token, or files that changed while they were read.
    """
    tallies, calls, labels = [], ToolCallAudit(tokenizer), LabelCounter()
    digests = digests_of(sources) if digests is None else digests
    with (
        DatasetWriter(folder) as writer,
        Workers(
            tokenizer,
            max_length=data.max_length,
            truncate=data.truncate,
            number=data.workers,
            objective=objective,
        ) as workers,
    ):
        for index, source in enumerate(sources):
            tally = Tally(source, data, context)
            skip = data.on_bad_row == "skip"
            for row, encoded in _encode(workers, source, tally, skip=skip):
                tally.add(row, encoded)
                if encoded.examples:
                    calls.add(row)
                    labels.add(row)
                values = objective.values_of(row)
                for example in encoded.examples:
                    writer.add(replace(example, values=values), index, row.place)
            tally.check()
            tallies.append(tally)
        # Rows of a file that is being written are neither the old nor the new ones, but the cache
        # would return them for this digest.
        for source, digest in zip(sources, digests, strict=True):
            source.refuse_changed(digest)
        stop_token_ids = sorted(
            {i for t in tallies for end in t.turn_ends if isinstance(end, tuple) for i in end}
        )
        is_text = all(tally.is_text for tally in tallies)
        counts: Counter[str] = sum((tally.counts for tally in tallies), Counter())
        writer.close(
            {
                "paths": [source.path for source in sources],
                "counts": [{name: tally.counts[name] for name in _COUNTS} for tally in tallies],
                "ignored": [dict(tally.ignored.most_common()) for tally in tallies],
                "repaired": [dict(tally.repaired.most_common()) for tally in tallies],
                "tool_problems": dict(calls.counts.most_common()),
                "tool_problem_places": calls.places,
                "contradicted_places": [p for one in tallies for p in one.contradicted][:NAMED],
                "labels": labels.labels(),
                _key_of("supervised_as"): "texts" if is_text else tallies[0].supervised_as,
                "stop_token_ids": stop_token_ids,
                "stops": [str(tokenizer.convert_ids_to_tokens(i)) for i in stop_token_ids],
                **{name: counts[name] for name in _COUNTS},
                "longest": max(tally.longest for tally in tallies),
                "digest": joined_digest(digests),
                "rows_digest": writer.digest,
            }
        )
    return PreparedData.open_written(folder)


def digests_of(sources: Sequence[Source]) -> list[str]:
    """Hash the data of each source; its location does not matter."""
    return [source.digest() for source in sources]


def joined_digest(digests: Sequence[str]) -> str:
    """Combine the digests of several sources into one."""
    return digests[0] if len(digests) == 1 else hash_text(" ".join(digests))


def prepare_prompts(
    source: Source,
    tokenizer: PreTrainedTokenizerFast,
    *,
    skip: bool = False,
    limit: int | None = None,
) -> list[Prompt]:
    """Make a prompt with its reference from each row of a source.

    Args:
        skip: leave out bad rows.
        limit: maximum number of prompts.

    Raises:
        DataError: there are no rows, bad rows (all are counted), or rows without right answers.
    """
    refuse_without_answers(source.format, source.path)
    encoder = Encoder(tokenizer)
    bad, is_checked = BadRows(tries_repairs=not skip), False
    prompts: list[Prompt] = []
    repaired: Counter[str] = Counter()
    for row in source.conversations(bad):
        if len(prompts) == limit:
            break
        if not is_checked and row.messages[0].role != "text":
            encoder.check_template()
            is_checked = True
        try:
            prompt = encoder.to_prompt(row.messages, row.tools)
        except DataError as error:
            bad.add(row.place, error)
        else:
            text = str(tokenizer.decode(prompt.input_ids))
            prompts.append(replace(prompt, text=text, place=row.place))
            repaired.update(row.repaired)
    bad.repaired = repaired
    if bad.count and not prompts:
        raise source.unusable(bad)
    bad.check(source.title, skip=skip, is_listed=isinstance(source, Portion))
    return prompts


_NAMED = 10
"""Message keys named in a warning."""

_COUNTS = (
    "num_rows",
    "num_bad",
    "num_swallowed",
    "num_lost",
    "num_truncated",
    "num_answers",
    "num_lost_answers",
    "num_typed",
    "num_with_tools",
    "num_scored",
    "num_contradicted",
    "num_tokens",
    "num_supervised",
)


def _encode(
    workers: Workers, source: Source, tally: Tally, *, skip: bool
) -> Iterator[tuple[Conversation, EncodedRow]]:
    # Both are joined at the end: how far reading is ahead of encoding depends on the number of
    # workers, and the report must not.
    bad, refused = BadRows(tries_repairs=not skip), BadRows()
    rows = _noting(source.conversations(bad), tally.ignored)
    for row, encoded in workers.encode(rows):
        if isinstance(encoded, RefusedRow):
            refused.add(row.place, encoded.reason)
        else:
            yield row, encoded
    if tally.ignored:
        log.warning("%s: not read in messages: %s", source.path, ignored_text(tally.ignored))
    # Only now is it known which of the repaired rows are used.
    bad.repaired = tally.repaired
    bad.extend(refused)
    if bad.count and not tally.counts["num_rows"]:
        raise none_usable(workers, source, bad)
    check_bad_rows(workers, source, bad, skip=skip)
    tally.counts.update(num_bad=bad.count, num_swallowed=bad.num_swallowed)


def _noting(rows: Iterator[Conversation], ignored: Counter[str]) -> Iterator[Conversation]:
    for row in rows:
        ignored.update(key for message in row.messages for key in message.ignored)
        yield row


def ignored_text(ignored: Mapping[str, int]) -> str:
    """List message keys that are not read, with the number of messages: `name 7, date 2`."""
    most = sorted(ignored.items(), key=lambda item: -item[1])
    return first_names([f"{shortened(key)!r} ({count:,})" for key, count in most], _NAMED)
