"""Compute figures from observed runs. Pure functions."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.race.machine import MOST_BY_OTHERS, others_share
from benchmarks.race.process import Mark, Observed
from benchmarks.race.rows import Rows

Figures = dict[str, Any]

_SPREAD = ("tokens_per_second", "cpu_seconds_per_1000_tokens")


def of_run(
    seen: Observed, *, warmup: int, threads: int, num_processors: int, interpreter_mb: float
) -> Figures:
    """Compute the figures of one run.

    Args:
        warmup: first steps that do not count (they are reported by their seconds).
        interpreter_mb: memory of the loaded interpreter.
    """
    if seen.failure or seen.loaded is None or len(seen.steps) <= warmup:
        return {"failed": seen.failure or f"{len(seen.steps)} steps were seen"}
    marks = [seen.loaded, *(mark for mark, _ in seen.steps)]
    first, last = marks[warmup], marks[-1]
    tokens = _per_step(seen.steps)
    counted, seconds = sum(tokens[warmup:]), last.at - first.at
    cpu_seconds = last.cpu_seconds - first.cpu_seconds
    peak = max(mark.peak_mb for mark in marks)
    others = others_share(
        first.machine,
        last.machine,
        own_seconds=cpu_seconds,
        seconds=seconds,
        num_processors=num_processors,
    )
    most = max(others, seen.others_before)
    return {
        "tokens_per_second": counted / seconds,
        "best_step_tokens_per_second": max(
            number / (b.at - a.at)
            for (a, b), number in zip(
                itertools.pairwise(marks[warmup:]), tokens[warmup:], strict=True
            )
        ),
        "cpu_seconds_per_1000_tokens": cpu_seconds / counted * 1000,
        "seconds_to_loaded_model": seen.loaded.at,
        "seconds_to_first_step": marks[1].at,
        "step_seconds": [b.at - a.at for a, b in itertools.pairwise(marks)],
        "peak_mb": peak,
        "above_interpreter_mb": peak - interpreter_mb,
        "above_loaded_mb": max(mark.peak_mb for mark in marks[1:]) - seen.loaded.resident_mb,
        "losses": [step["loss"] for _, step in seen.steps],
        "tokens": tokens,
        "supervised": [int(step["supervised"]) for _, step in seen.steps],
        "processors_kept_busy": cpu_seconds / seconds / threads,
        "others_share": others,
        "others_share_before": seen.others_before,
        "load_average_before": seen.load_average,
        "others_share_most": most,
        "is_busy": most > MOST_BY_OTHERS,
        **seen.facts,
    }


def _per_step(steps: Sequence[tuple[Mark, Mapping[str, float]]]) -> list[int]:
    so_far = [0, *(int(step["tokens_so_far"]) for _, step in steps)]
    return [b - a for a, b in itertools.pairwise(so_far)]


def loss_difference(run: Figures, reference: Figures) -> float | None:
    """Return the largest relative difference of a step's loss; None if the rows differ."""
    same = all(run[key] == reference[key] for key in ("tokens", "supervised"))
    if not same:
        return None
    pairs = zip(run["losses"], reference["losses"], strict=True)
    return max(abs(ours - theirs) / theirs for ours, theirs in pairs)


def has_rows(run: Figures, rows: Rows) -> bool:
    """Return True if each step of a run trained on the expected number of tokens."""
    wanted = [list(map(sum, part)) for part in (rows.lengths, rows.supervised)]
    return [run["tokens"], run["supervised"]] == wanted


def together(runs: Sequence[Figures]) -> Figures:
    """Combine several runs of one contestant: medians, and the range of the speed.

    The load by other processes is the maximum over the runs, so one busy run marks them all busy.
    Lists, such as losses, are those of the first run. Failed runs do not count.
    """
    whole = [run for run in runs if "failed" not in run]
    if not whole:
        return {"failed": runs[0]["failed"], "repetitions": 0}
    joined: Figures = {"repetitions": len(whole), "num_failed": len(runs) - len(whole)}
    for key, value in whole[0].items():
        if isinstance(value, bool):
            joined[key] = any(run[key] for run in whole)
        elif key == "others_share_most":
            joined[key] = max(run[key] for run in whole)
        elif isinstance(value, int | float):
            joined[key] = statistics.median(run[key] for run in whole)
        else:
            joined[key] = value
    for key in _SPREAD:
        values = [run[key] for run in whole]
        joined[f"{key}_spread"] = [min(values), max(values)]
    return joined


def fastest(results: Mapping[str, Figures]) -> str | None:
    """Return the name of the fastest contestant; None if all failed."""
    whole = {name: f["tokens_per_second"] for name, f in results.items() if "failed" not in f}
    return max(whole, key=lambda name: whole[name]) if whole else None
