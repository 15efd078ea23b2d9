"""Measure speed and memory by row length, micro-batch and rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.race.contestants import Contestant, Sizes, micro_batch_of
from benchmarks.race.rows import Rows, gsm8k, of_length, write
from benchmarks.race.stage import Stage, say

STEPS = 3
"""Steps of each short run. The first does not count."""


def run(
    stage: Stage,
    several: Sequence[Contestant],
    data: Path,
    sizes: Sizes,
    *,
    lengths: Sequence[int],
    micro_batches: Sequence[int],
    ranks: Sequence[int],
    tokens_per_step: int,
) -> list[dict[str, Any]]:
    """Run each contestant briefly at each point.

    Args:
        lengths: tokens per row; one row per forward, `tokens_per_step` tokens per step.
        micro_batches, ranks: values to try on the first rows of GSM8K.
    """
    points: list[dict[str, Any]] = []

    def at(by: str, value: int, rows: Rows, these: Sizes) -> None:
        say(f"-- {by} {value}")
        for one in several:
            figures = stage.run(micro_batch_of(one, these.micro_batch), rows, these)
            points.append(
                {
                    "by": by,
                    "value": value,
                    "threads": stage.threads,
                    "contestant": one.name,
                    **figures,
                }
            )

    for length in lengths:
        number = max(1, tokens_per_step // length)
        these = replace(sizes, rows_per_step=number, micro_batch=1, max_length=max(length, 64))
        at("length", length, _long_rows(stage, data, length, these), these)
    if micro_batches or ranks:
        rows = _short_rows(stage, data, sizes)
        for number in micro_batches:
            at("micro_batch", number, rows, replace(sizes, micro_batch=number))
        for r in ranks:
            at("rank", r, rows, replace(sizes, r=r, alpha=2 * r))
    return points


def _long_rows(stage: Stage, data: Path, length: int, sizes: Sizes) -> Rows:
    return _write(
        stage,
        of_length(data, stage.model, length, STEPS * sizes.rows_per_step),
        sizes,
        f"length-{length}",
    )


def _short_rows(stage: Stage, data: Path, sizes: Sizes) -> Rows:
    return _write(stage, gsm8k(data, STEPS * sizes.rows_per_step), sizes, "growth")


def _write(stage: Stage, conversations: list[Any], sizes: Sizes, name: str) -> Rows:
    folder = stage.work / name
    folder.mkdir(parents=True)
    return write(
        conversations,
        folder,
        stage.model,
        rows_per_step=sizes.rows_per_step,
        max_length=sizes.max_length,
        seed=sizes.seed,
    )
