"""The log of a run shows what a user acts on; the rest belongs to -v."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import exit_code

MAX_LINES = 10
"""Lines before the first step."""


def lines_before_the_first_step(log: str) -> list[str]:
    lines = log.splitlines()
    return lines[: next(i for i, line in enumerate(lines) if line.startswith("step 1/"))]


@pytest.mark.quick_every(2)
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_ten_lines_come_before_the_first_step(
    write_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str], quantization: str
) -> None:
    recipe = write_recipe(
        quantization={"type": quantization},
        training={"max_steps": 40, "log_every": 10},
        optimizer={"type": "paged_adamw_32bit"},
    )
    assert exit_code("train", recipe) == 0
    printed, log = capsys.readouterr()
    lines = log.splitlines()
    before = lines[: next(i for i, line in enumerate(lines) if line.startswith("step 10/"))]
    assert len(before) <= MAX_LINES, log
    assert before[0].startswith("device: ")
    for internal in ("planned_", "tried_memory", "packing checked", "100.0%", "kernels: "):
        assert internal not in log
    summary, following = printed.splitlines()
    assert "; training loss " in summary
    assert "; best loss " in summary
    assert "weights in last/ and best/" in summary
    assert following.startswith("next: qlora eval ")


def test_verbose_shows_the_rest(
    write_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code("train", write_recipe(), "-v") == 0
    before = lines_before_the_first_step(capsys.readouterr().err)
    for line in ("audit of training data", "packing checked", "kernels: ", "  q_proj "):
        assert any(one.startswith(line) for one in before), line
    assert not any("planned_" in one for one in before)
