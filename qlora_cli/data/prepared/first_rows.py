"""Read the first rows of a source, and refuse a source without a usable row."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlora_cli.data.encode.encoder import RefusedRow
from qlora_cli.data.prepared.tally import Tally
from qlora_cli.data.prepared.workers import Workers
from qlora_cli.data.sources import BadRows, Portion, Source
from qlora_cli.errors import DataError
from qlora_cli.types import ModelContext

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from qlora_cli.data.config import Data


def check_first_rows(
    source: Source,
    tokenizer: PreTrainedTokenizerFast,
    data: Data,
    *,
    num_rows: int,
    context: ModelContext | None = None,
) -> None:
    """Encode the first `num_rows` rows of a source, and more until one of them is usable.

    Args:
        context: that of the model; no longer row is advised.

    Raises:
        DataError: no row of the source can be used, or one that is read is a preference row.
    """
    bad, refused = BadRows(tries_repairs=data.on_bad_row != "skip"), BadRows()
    tally = Tally(source, data, context)
    with Workers(
        tokenizer, max_length=data.max_length, truncate=data.truncate, number=1
    ) as workers:
        rows = workers.encode(source.conversations(bad))
        for number, (row, encoded) in enumerate(rows, start=1):
            if isinstance(encoded, RefusedRow):
                refused.add(row.place, encoded.reason)
            else:
                tally.add(row, encoded)
            if number >= num_rows and tally.num_kept:
                return
        if not tally.counts["num_rows"]:
            bad.extend(refused)
            raise none_usable(workers, source, bad)
    if not tally.num_kept:
        tally.check_lost()


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
