"""Measures of predicted labels and numbers, over bootstrap resamples at once.

Values are (..., n): the leading axes are resamples of n examples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from qlora_cli.tasks.task import Values

if TYPE_CHECKING:
    from numpy import float64
    from numpy.typing import NDArray

    Column = NDArray[float64]

OfLabel = Callable[["Column", "Column"], "Column"]
"""Computes a measure (...) of one label from a prediction and the truth, both (..., n)."""


def mean_over_labels(of_label: OfLabel, prediction: str, number: int) -> Callable[[Values], Column]:
    """Average a measure over the labels for which it is defined.

    Args:
        of_label: NaN where it is not defined.
        prediction: the values of label k are called `prediction` and k.
    """

    def aggregate(values: Values) -> Column:
        import numpy as np

        each = [of_label(values[f"{prediction}{k}"], values[f"_label{k}"]) for k in range(number)]
        columns = np.stack(each)  # (K, ...)
        counts = (~np.isnan(columns)).sum(0)
        mean: Column = np.nansum(columns, 0) / np.where(counts, counts, np.nan)
        return mean

    return aggregate


def f1(chosen: Column, label: Column) -> Column:
    """Compute F1 of a label; NaN if it is neither in the rows nor predicted."""
    import numpy as np

    hits = (chosen * label).sum(-1)
    either = chosen.sum(-1) + label.sum(-1)
    found: Column = 2 * hits / np.where(either, either, np.nan)
    return found


def auroc(score: Column, label: Column) -> Column:
    """Compute the area under the ROC curve: the share of pairs of a row with the label and one
    without it in which the former has the higher score. Equal scores count one half.

    It is NaN if all rows have the label, or none.
    """
    import numpy as np

    ranks = mid_ranks(score)
    positive, number = label.sum(-1), score.shape[-1]
    pairs = positive * (number - positive)
    above = (ranks * label).sum(-1) - positive * (positive + 1) / 2
    found: Column = above / np.where(pairs, pairs, np.nan)
    return found


def spearman(score: Column, label: Column) -> Column:
    """Compute the rank correlation; NaN if all scores or all labels are the same."""
    import numpy as np

    centered = []
    for column in (score, label):
        ranks = mid_ranks(column)
        centered.append(ranks - ranks.mean(-1, keepdims=True))
    first, second = centered
    spread = np.sqrt((first**2).sum(-1) * (second**2).sum(-1))
    found: Column = (first * second).sum(-1) / np.where(spread, spread, np.nan)
    return found


def mid_ranks(values: Column) -> Column:
    """Rank along the last axis from 1; equal values share the mean of their ranks."""
    import numpy as np

    # Resamples repeat values, so counting them is quicker than sorting each resample.
    distinct, codes = np.unique(values, return_inverse=True)
    rows = codes.reshape(-1, values.shape[-1])  # (R, n)
    offsets = np.arange(len(rows))[:, None] * len(distinct)
    flat = np.bincount((rows + offsets).ravel(), minlength=len(rows) * len(distinct))
    counts = flat.reshape(len(rows), len(distinct))
    ranks = counts.cumsum(1) - (counts - 1) / 2
    found: Column = np.take_along_axis(ranks, rows, 1).reshape(values.shape)
    return found


def confusion(values: Values, number: int) -> list[list[int]]:
    """Count rows by label (the rows of the table) and predicted label (its columns)."""

    def column(name: str) -> Sequence[Column]:
        return [values[f"{name}{k}"] for k in range(number)]

    labels, chosen = column("_label"), column("_chosen")
    return [[int((label * one).sum()) for one in chosen] for label in labels]
