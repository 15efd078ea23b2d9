"""Measures of heads against their definitions, one resample at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qlora_cli.tasks.head_measures import (
    auroc,
    confusion,
    f1,
    mean_over_labels,
    mid_ranks,
    spearman,
)

GENERATOR = np.random.default_rng(0)


def pairs_won(score: Any, label: Any) -> float:
    with_label, without = score[label == 1], score[label == 0]
    wins = (with_label[:, None] > without) + 0.5 * (with_label[:, None] == without)
    return float(wins.mean()) if wins.size else float("nan")


@pytest.mark.parametrize("values", [3, 50])
def test_auroc_is_the_share_of_pairs_in_the_right_order(values: int) -> None:
    score = GENERATOR.integers(values, size=(7, 40)).astype(float)
    label = GENERATOR.integers(2, size=(7, 40)).astype(float)
    label[0], label[1] = 1, 0  # not defined
    wanted = [pairs_won(*row) for row in zip(score, label, strict=True)]
    np.testing.assert_allclose(auroc(score, label), wanted, rtol=1e-12)
    assert auroc(score[2], label[2]) == pytest.approx(wanted[2])


def test_equal_values_share_the_mean_of_their_ranks() -> None:
    assert mid_ranks(np.array([[3.0, 1.0, 3.0, 2.0]])).tolist() == [[3.5, 1.0, 3.5, 2.0]]


def test_spearman_is_the_correlation_of_ranks() -> None:
    x = GENERATOR.integers(9, size=(5, 30)).astype(float)
    y = x + GENERATOR.normal(size=(5, 30))
    wanted = [
        np.corrcoef(mid_ranks(a[None])[0], mid_ranks(b[None])[0])[0, 1]
        for a, b in zip(x, y, strict=True)
    ]
    np.testing.assert_allclose(spearman(x, y), wanted, rtol=1e-10)
    assert np.isnan(spearman(np.ones(4), np.arange(4.0)))
    assert spearman(np.arange(4.0) ** 3, np.arange(4.0)) == pytest.approx(1)


def test_means_leave_out_labels_that_are_not_there() -> None:
    label = {"_label0": [1, 1, 0, 0], "_label1": [0, 0, 1, 1], "_label2": [0, 0, 0, 0]}
    chosen = {"_chosen0": [1, 0, 0, 0], "_chosen1": [0, 1, 1, 1], "_chosen2": [0, 0, 0, 0]}
    values = {name: np.array(one, float) for name, one in {**label, **chosen}.items()}
    # F1 of label 0: 2 * 1 / (1 + 2); of label 1: 2 * 2 / (3 + 2).
    found = mean_over_labels(f1, "_chosen", 3)(values)
    assert found == pytest.approx((2 / 3 + 4 / 5) / 2)
    assert confusion(values, 3) == [[1, 1, 0], [0, 2, 0], [0, 0, 0]]
