"""Score all rows of a file with the head of a model."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_cli.common.report import Report
from qlora_cli.data.prompts import read_each
from qlora_cli.data.scored_rows import ScoredRow, ScoredRowReader
from qlora_cli.data.sources import Source
from qlora_cli.inference.batch import write_lines
from qlora_cli.inference.session import InferenceSession
from qlora_cli.models.head_scores import probabilities, score_rows
from qlora_cli.types import HeadSpec

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger("qlora")


@dataclass(frozen=True, slots=True)
class PredictionReport(Report):
    """Predictions for all rows of a file."""

    output: str
    """The file that was written."""
    model: str
    """Name of the model that predicted: `base` or `tuned`."""
    rows: int
    """Number of rows."""
    cut: int
    """Number of rows that were longer than `data.max_length` and were cut."""
    seconds: float
    """Time spent predicting."""


def row_reader(session: InferenceSession) -> ScoredRowReader:
    """Return the reader of rows in the form of the training rows."""
    data = session.recipe.data
    return ScoredRowReader(
        session.formats,
        session.default.encoder,
        max_length=data.max_length,
        truncate=data.truncate,
    )


def predict(
    session: InferenceSession, rows: Source, output: Path, *, batch_size: int
) -> PredictionReport:
    """Score every row of a file and write one JSON line per row, in the order of the file.

    Raises:
        DataError: a row cannot be read.
    """
    reader = row_reader(session)
    found = list(read_each(rows, reader.read))
    started = time.monotonic()
    scored = [row for _, row in found]
    lines = [
        {"place": place, "text": row.text, **prediction, "reference": row.label}
        for (place, row), prediction in zip(
            found, predictions(session, scored, batch_size=batch_size), strict=True
        )
    ]
    write_lines(output, lines)
    cut = sum(row.is_cut for row in scored)
    if cut:
        log.warning(
            "%s of %s rows have more than data.max_length (%s tokens), and were cut",
            f"{cut:,}",
            f"{len(scored):,}",
            f"{session.recipe.data.max_length:,}",
        )
    return PredictionReport(
        output=str(output),
        model=session.default.name,
        rows=len(scored),
        cut=cut,
        seconds=round(time.monotonic() - started, 1),
    )


def predictions(
    session: InferenceSession, rows: Sequence[ScoredRow], *, batch_size: int
) -> list[dict[str, Any]]:
    """Return what the head says about each row.

    For one label per row, `label` and `probabilities` (label -> probability); for any number of
    labels, `labels` and `probabilities`; for a number, `value`.
    """
    head = session.head
    assert head is not None, "open_session(scores_rows=True) refuses other models"
    with session.weights(session.default) as model:
        outputs = score_rows(
            model,
            [row.example for row in rows],
            session.dtype,
            device=session.world.device,
            batch_size=batch_size,
            pad_token_id=session.default.tokenizer.pad_token_id,
            name="rows",
        )
    return [_prediction(head, one) for one in probabilities(outputs, head.problem)]


def _prediction(head: HeadSpec, found: Tensor) -> dict[str, Any]:
    values: list[float] = found.tolist()
    if head.problem == "regression":
        return {"value": values[0]}
    shares = dict(zip(head.labels, values, strict=True))
    if head.problem == "multi":
        labels = [label for label, share in shares.items() if share > 0.5]
        return {"labels": labels, "probabilities": shares}
    return {"label": head.labels[values.index(max(values))], "probabilities": shares}
