"""Refuse bad rows and sources without a usable row; read the first rows of a source for that."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from qlora_cli.data.encode.encoder import RefusedRow
from qlora_cli.data.prepared.tally import Tally
from qlora_cli.data.prepared.workers import Workers
from qlora_cli.data.sources import BadRows, Portion, Source
from qlora_cli.errors import DataError
from qlora_cli.objectives import SUPERVISED, ObjectiveSettings
from qlora_cli.types import ModelContext

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from qlora_cli.data.config import Data

log = logging.getLogger("qlora")


def check_first_rows(
    source: Source,
    tokenizer: PreTrainedTokenizerFast,
    data: Data,
    *,
    num_rows: int,
    context: ModelContext | None = None,
    objective: ObjectiveSettings = SUPERVISED,
) -> None:
    """Encode the first `num_rows` rows of a source, and more until one of them is usable.

    If these are all rows of the run, they are refused as `prepare` refuses them. Otherwise, what
    further rows could outweigh is a warning.

    Args:
        context: that of the model; no longer row is advised.
        objective: has to know the label of each row.

    Raises:
        DataError: no row of the source can be used, one that is read is bad and `data.on_bad_row`
            does not skip it, or one is a preference row.
    """
    skip, rows = data.on_bad_row == "skip", source.in_file_order()
    bad, refused = BadRows(tries_repairs=not skip), BadRows()
    tally, is_whole = Tally(rows, data, context), True
    with Workers(
        tokenizer,
        max_length=data.max_length,
        truncate=data.truncate,
        number=1,
        objective=objective,
    ) as workers:
        for number, (row, encoded) in enumerate(workers.encode(rows.conversations(bad)), start=1):
            if number > num_rows and tally.num_kept:
                is_whole = False
                break
            if isinstance(encoded, RefusedRow):
                refused.add(row.place, encoded.reason)
            else:
                tally.add(row, encoded)
        bad.extend(refused)
        if not tally.counts["num_rows"]:
            raise none_usable(workers, rows, bad)
        if is_whole and not _is_drawn(source):
            check_bad_rows(workers, rows, bad, skip=skip)
            tally.check()
            return
    check_first_bad_rows(source, bad, num_rows, skip=skip)
    try:
        tally.check()
    except DataError as error:
        if not tally.num_kept:
            raise
        log.warning("of the first %d rows: %s; %s", num_rows, error, error.hint)


def check_first_bad_rows(source: Source, bad: BadRows, num_rows: int, *, skip: bool) -> None:
    """Report the bad rows among the first `num_rows` rows of a source.

    Args:
        skip: log a warning instead of raising.

    Raises:
        DataError: there are bad rows, and the run reads them.
    """
    title = f"{source.title}, of the first {num_rows} rows"
    if bad.count and _is_drawn(source) and not skip:
        log.warning("%s", bad.report(title))
        return
    bad.check(title, skip=skip, is_listed=isinstance(source, Portion))


def _is_drawn(source: Source) -> bool:
    """Tell if a run draws some of the rows, which may not be the first ones."""
    return source.shuffle and source.limit is not None


def check_bad_rows(workers: Workers, source: Source, bad: BadRows, *, skip: bool) -> None:
    """Report the bad rows of a source. An error names those of all its portions.

    Args:
        skip: log a warning instead of raising.

    Raises:
        DataError: there are bad rows.
    """
    title = source.title
    if not skip and isinstance(source, Portion) and source.share is not None:
        title = source.path
        bad = _all_bad_rows(workers, source.whole()) if bad.count else bad
    bad.check(title, skip=skip, is_listed=isinstance(source, Portion))


def _all_bad_rows(workers: Workers, source: Source) -> BadRows:
    """Find the bad rows of all portions of a source, so that one error names all of them."""
    bad = BadRows()
    for row, encoded in workers.encode(source.conversations(bad)):
        if isinstance(encoded, RefusedRow):
            bad.add(row.place, encoded.reason)
    return bad


def none_usable(workers: Workers, source: Source, bad: BadRows) -> DataError:
    """Return the error for a source without a usable row.

    If its other portion has none either, the error names the bad rows of both.

    Args:
        bad: the bad rows of this portion.
    """
    if not isinstance(source, Portion) or source.share is None:
        return source.unusable(bad)
    whole, all_bad, refused = source.whole(), BadRows(), BadRows()
    for row, encoded in workers.encode(whole.conversations(all_bad)):
        if not isinstance(encoded, RefusedRow):
            return source.unusable(bad)
        refused.add(row.place, encoded.reason)
    all_bad.extend(refused)
    return whole.unusable(all_bad)
