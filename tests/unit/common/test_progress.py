from __future__ import annotations

import logging

import pytest

from qlora_cli.common.progress import Progress


def test_a_line_is_written_every_ten_seconds_at_most(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = [0.0]
    monkeypatch.setattr("qlora_cli.common.progress.time.monotonic", lambda: clock[0])
    caplog.set_level(logging.INFO, "qlora")
    progress = Progress("tuned: answers", 100)
    for _ in range(10):
        clock[0] += 4
        progress.add(10)
    # After 12, 24 and 36 seconds; at the end nothing is left to wait for.
    assert caplog.messages == [
        "tuned: answers: 30 of 100, about 0:28 left",
        "tuned: answers: 60 of 100, about 0:16 left",
        "tuned: answers: 90 of 100, about 0:04 left",
    ]
