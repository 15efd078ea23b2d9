"""Durations in reports."""

from __future__ import annotations

import pytest

from qlora_cli.common.formatting import duration_range_text, duration_text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "under a second"),
        (0.99, "under a second"),
        (1, "1 s"),
        (119, "119 s"),
        (120, "2.0 min"),
        (7200, "2.0 h"),
        (3 * 86400, "3.0 d"),
    ],
)
def test_a_duration_is_never_zero(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


@pytest.mark.parametrize(
    ("low", "high", "text"),
    [
        (0.01, 0.2, "under a second"),
        (0.4, 3, "up to about 3 s"),
        (3.1, 3.2, "about 3 s"),
        (3, 130, "about 3 s to 2.2 min"),
    ],
)
def test_a_range_of_durations(low: float, high: float, text: str) -> None:
    assert duration_range_text(low, high) == text
