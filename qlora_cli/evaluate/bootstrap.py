"""Intervals by the bootstrap over examples (percentile method, Efron & Tibshirani 1993, ch. 13)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from qlora_cli.tasks.task import Measure, Outcome, Values

CONFIDENCE = 0.95
RESAMPLES = 2000
SEED = 0

_CHUNK_VALUES = 2**22
"""Values drawn at once, so that memory does not grow with the examples."""

_TAIL = (1 - CONFIDENCE) / 2


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure and its interval, which is None for fewer than two examples."""

    value: float
    low: float | None
    high: float | None

    @property
    def is_clear(self) -> bool:
        """Whether zero is outside of the interval."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high

    def record(self) -> dict[str, float | None]:
        """As JSON, which has no infinity."""
        found: dict[str, float | None] = asdict(self)
        return {k: v if v is not None and math.isfinite(v) else None for k, v in found.items()}


def columns(outcomes: Sequence[Outcome]) -> Values:
    """The values of outcomes by name, each (n,)."""
    names = outcomes[0].values
    return {name: np.array([o.values[name] for o in outcomes], np.float64) for name in names}


def estimates(measure: Measure, models: Sequence[Values]) -> tuple[list[Estimate], list[Estimate]]:
    """A measure of each model, and its difference from the first for each other model.

    The same examples are drawn for all models, so the differences are paired: what makes an example
    hard for all of them does not widen their interval.

    Args:
        models: for each, the values of the same n examples in the same order.
    """
    values = [float(measure.aggregate(model)) for model in models]
    (number,) = {len(column) for model in models for column in model.values()}
    drawn = np.concatenate(
        [
            np.stack([measure.aggregate(_taken(model, rows)) for model in models])
            for rows in _resamples(number)
        ],
        axis=1,
    )  # (models, RESAMPLES)
    single = [
        _estimate(value, row, number, measure, lowest=0.0)
        for value, row in zip(values, drawn, strict=True)
    ]
    first, *others = values
    differences = [
        _estimate(value - first, row - drawn[0], number, measure, lowest=-1.0)
        for value, row in zip(others, drawn[1:], strict=True)
    ]
    return single, differences


def _resamples(number: int) -> Iterator[NDArray[np.int64]]:
    """Indices of the examples drawn, (resamples, n): the same at every call."""
    generator = np.random.default_rng(SEED)
    step = max(1, _CHUNK_VALUES // number)
    for start in range(0, RESAMPLES, step):
        yield generator.integers(number, size=(min(step, RESAMPLES - start), number))


def _taken(values: Values, rows: NDArray[np.int64]) -> Values:
    return {name: column[rows] for name, column in values.items()}


def _estimate(
    value: float, drawn: NDArray[np.float64], number: int, measure: Measure, *, lowest: float
) -> Estimate:
    if number < 2 or not np.isfinite(drawn).all():
        return Estimate(value, None, None)
    low, high = (float(end) for end in np.quantile(drawn, [_TAIL, 1 - _TAIL]))
    if measure.is_share and low == high:
        # Nothing varied, which a bootstrap takes for certainty. Of n examples without an exception
        # the share of exceptions is still only known to be below this (Clopper & Pearson 1934).
        margin = 1 - _TAIL ** (1 / number)
        low, high = max(lowest, value - margin), min(1.0, value + margin)
    return Estimate(value, low, high)
