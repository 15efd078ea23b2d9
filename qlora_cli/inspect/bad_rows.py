"""Write all rows that cannot be used to a file."""

from __future__ import annotations

import json
import logging
from contextlib import suppress
from pathlib import Path

from qlora_cli.common.atomic_files import atomic_file
from qlora_cli.data.config import Data
from qlora_cli.data.encode.encoder import RefusedRow
from qlora_cli.data.prepared.workers import Workers
from qlora_cli.data.render.chat_template import read_chat_template
from qlora_cli.data.sources import BadRows, Source, counted
from qlora_cli.errors import DataError, RecipeError
from qlora_cli.recipe.schema import Recipe

log = logging.getLogger("qlora")


def write_bad_rows(recipe: Recipe, path: Path) -> int:
    """Write a JSON line with `row` (its place) and `reason` for each bad row; return their number.

    Raises:
        QloraError: the file cannot be written, or the tokenizer cannot be loaded.
    """
    data, count = recipe.data, 0
    tokenizer = recipe.model.load_tokenizer(read_chat_template(data.chat_template))
    try:
        with atomic_file(path) as unfinished, unfinished.open("w", encoding="utf-8") as file:

            def write(place: str, reason: str) -> None:
                file.write(json.dumps({"row": place, "reason": reason}) + "\n")

            for source in _whole_sources(data):
                bad = BadRows(write=write, tries_repairs=False)
                # A source without a usable row, or without a row at all, is an error of the
                # preview that follows.
                with (
                    suppress(DataError),
                    Workers(
                        tokenizer,
                        max_length=data.max_length,
                        truncate=data.truncate,
                        number=data.workers,
                        objective=recipe.objective,
                    ) as workers,
                ):
                    for row, encoded in workers.encode(source.conversations(bad)):
                        if isinstance(encoded, RefusedRow):
                            bad.add(row.place, encoded.reason)
                count += bad.count
    except OSError as error:
        raise RecipeError(f"--bad-rows: {path}: cannot be written: {error.strerror}") from error
    log.info("%s: %s of all sources, held-out rows included", path, counted(count, "bad row"))
    return count


def _whole_sources(data: Data) -> list[Source]:
    """Return each source once, with the rows that `evaluation_share` holds out."""
    found: list[Source] = []
    for source in [*data.train_sources, *data.evaluation_sources]:
        if (whole := source.whole()) not in found:
            found.append(whole)
    return found
