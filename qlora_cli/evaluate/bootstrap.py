"""Bootstrap intervals over the examples (percentile method, Efron & Tibshirani 1993, ch. 13)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qlora_cli.common.report import Report
from qlora_cli.tasks.task import Measure, Outcome, Values

CONFIDENCE = 0.95
RESAMPLES = 2000
SEED = 0

_CHUNK_VALUES = 2**22
"""Maximum values drawn at a time, so that memory does not grow with the number of examples."""

_TAIL = (1 - CONFIDENCE) / 2


@dataclass(frozen=True, slots=True)
class Estimate(Report):
    """A measured value and its confidence interval."""

    value: float
    """The value; null in JSON if it is not finite."""
    low: float | None
    """Lower end of the interval; null for fewer than two examples."""
    high: float | None
    """Upper end of the interval; null for fewer than two examples."""

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form, in which a value that is not finite is null."""
        values = {"value": self.value, "low": self.low, "high": self.high}
        return {k: v if v is not None and math.isfinite(v) else None for k, v in values.items()}


def value_columns(outcomes: Sequence[Outcome]) -> Values:
    """Collect the values of outcomes by name, each as an array (n,)."""
    names = outcomes[0].values
    return {name: np.array([o.values[name] for o in outcomes], np.float64) for name in names}


def estimate_measure(
    measure: Measure, models: Sequence[Values]
) -> tuple[list[Estimate], list[Estimate]]:
    """Estimate a measure of each model, and the difference of each later model from the first.

    All models use the same resamples, so the differences are paired: an example that is hard for
    every model does not widen their interval.

    Args:
        models: for each model, the values of the same n examples in the same order.
    """
    values = [float(measure.aggregate(model)) for model in models]
    (number,) = {len(column) for model in models for column in model.values()}
    drawn = np.concatenate(
        [
            np.stack([measure.aggregate(_resample(model, rows)) for model in models])
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
    """Yield indices of the drawn examples, (resamples, n): the same in every call."""
    generator = np.random.default_rng(SEED)
    step = max(1, _CHUNK_VALUES // number)
    for start in range(0, RESAMPLES, step):
        yield generator.integers(number, size=(min(step, RESAMPLES - start), number))


def _resample(values: Values, rows: NDArray[np.int64]) -> Values:
    return {name: column[rows] for name, column in values.items()}


def _estimate(
    value: float, drawn: NDArray[np.float64], number: int, measure: Measure, *, lowest: float
) -> Estimate:
    if number < 2 or not np.isfinite(drawn).all():
        return Estimate(value, None, None)
    low, high = (float(end) for end in np.quantile(drawn, [_TAIL, 1 - _TAIL]))
    if measure.is_share and low == high:
        # All examples agree, so every resample does too, and the bootstrap interval is empty. With
        # no exception in n examples, the exact upper bound on the share of exceptions is this
        # margin (Clopper & Pearson 1934).
        margin = 1 - _TAIL ** (1 / number)
        low, high = max(lowest, value - margin), min(1.0, value + margin)
    return Estimate(value, low, high)
