"""Compare intervals with closed forms and with repeated sampling."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from qlora_cli.evaluate.bootstrap import Estimate, estimate_measure, value_columns
from qlora_cli.tasks import Loss
from qlora_cli.tasks.task import Measure, Outcome, Values, mean_of

MEAN = mean_of("x", is_share=False)
SHARE = mean_of("x")


def one(measure: Measure, *samples: object) -> Estimate:
    [estimate], _ = estimate_measure(measure, [{"x": np.array(samples, float)}])
    return estimate


def test_the_interval_of_a_mean_agrees_with_the_normal_distribution() -> None:
    """For many examples, the interval is the mean plus and minus 1.96 standard errors."""
    samples = np.random.default_rng(1).normal(3.0, 2.0, 2000)
    found = one(MEAN, *samples)
    error = 1.96 * samples.std() / math.sqrt(len(samples))
    assert found.value == pytest.approx(samples.mean())
    assert found.low == pytest.approx(samples.mean() - error, abs=error / 10)
    assert found.high == pytest.approx(samples.mean() + error, abs=error / 10)


def test_the_interval_of_a_few_examples_agrees_with_all_resamples() -> None:
    """Resampled means of 0 and 1 are 0, 1/2 or 1, with probability 1/4, 1/2 and 1/4."""
    assert one(MEAN, 0.0, 1.0) == Estimate(0.5, 0.0, 1.0)
    # The mean of 1, 2 and 4 is at least 1; (1/3)^3 = 3.7% of the resamples are all ones.
    assert one(MEAN, 1.0, 2.0, 4.0).low == 1.0


@pytest.mark.parametrize(
    ("draw", "truth"),
    [
        (lambda generator: generator.normal(0.0, 1.0, 60), 0.0),
        (lambda generator: (generator.random(60) < 0.3).astype(float), 0.3),
    ],
    ids=["normal", "share"],
)
def test_95_percent_of_intervals_contain_the_true_value(
    draw: Callable[[np.random.Generator], object], truth: float
) -> None:
    generator = np.random.default_rng(2)
    held = 0
    for _ in range(200):
        found = one(SHARE, *np.asarray(draw(generator)))
        assert found.low is not None
        assert found.high is not None
        held += found.low <= truth <= found.high
    # 190 are due, and 180 to 198 are within three standard errors.
    assert 180 <= held <= 198


def test_differences_are_paired_by_example() -> None:
    """Both models vary a lot between examples, but their difference is constant."""
    base = np.random.default_rng(3).normal(0.0, 10.0, 100)
    singles, [difference] = estimate_measure(MEAN, [{"x": base}, {"x": base + 0.5}])
    assert difference.value == pytest.approx(0.5)
    assert difference.low == pytest.approx(0.5)
    assert difference.high == pytest.approx(0.5)
    assert all(single.high - single.low > 3 for single in singles)


def test_the_difference_of_shares_has_the_spread_of_discordant_pairs() -> None:
    """The variance of a paired difference is (b + c - (b - c)^2 / n) / n^2 (McNemar's counts)."""
    base = np.repeat([1.0, 1.0, 0.0, 0.0], [500, 60, 100, 340])
    tuned = np.repeat([1.0, 0.0, 1.0, 0.0], [500, 60, 100, 340])
    _, [difference] = estimate_measure(SHARE, [{"x": base}, {"x": tuned}])
    error = 1.96 * math.sqrt(100 + 60 - 40**2 / 1000) / 1000
    assert difference.value == pytest.approx(0.04)
    assert difference.low == pytest.approx(0.04 - error, abs=0.002)
    assert difference.high == pytest.approx(0.04 + error, abs=0.002)


def test_a_rate_of_zero_has_a_nonzero_upper_bound() -> None:
    """All of 20 are wrong: the share of right ones is below 1 - 0.025^(1/20) (Clopper, Pearson)."""
    bound = 1 - 0.025 ** (1 / 20)
    assert one(SHARE, *[0.0] * 20) == Estimate(0.0, 0.0, pytest.approx(bound))
    assert one(SHARE, *[1.0] * 20) == Estimate(1.0, pytest.approx(1 - bound), 1.0)
    zeros = {"x": np.zeros(20)}
    _, [difference] = estimate_measure(SHARE, [zeros, zeros])
    assert difference == Estimate(0.0, pytest.approx(-bound), pytest.approx(bound))


def test_one_example_has_no_interval() -> None:
    assert one(MEAN, 4.0) == Estimate(4.0, None, None)
    assert Estimate(math.inf, None, None).to_json() == {"value": None, "low": None, "high": None}


def test_the_same_call_gives_the_same_interval() -> None:
    samples = np.random.default_rng(4).normal(size=50)
    assert one(MEAN, *samples) == one(MEAN, *samples)


def test_many_examples_are_resampled_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = np.random.default_rng(5).normal(size=64)
    whole = one(MEAN, *samples)
    monkeypatch.setattr("qlora_cli.evaluate.bootstrap._CHUNK_VALUES", 64 * 7)
    assert one(MEAN, *samples) == whole


def test_a_ratio_of_sums_is_resampled_by_example() -> None:
    """The loss is over tokens: a long example counts for as much as it has tokens."""
    outcomes = [
        Outcome("", "", "", "", {"nats": 2.0 * n, "tokens": float(n)}) for n in (1, 10, 100)
    ]
    loss, perplexity = Loss().measures()
    values: Values = value_columns(outcomes)
    assert estimate_measure(loss, [values])[0] == [Estimate(2.0, 2.0, 2.0)]
    assert estimate_measure(perplexity, [values])[0][0].value == pytest.approx(math.exp(2.0))
