"""The planned memory of the process holds the peak of real runs on a CPU."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.plan_process import make_cell, measure, plan_of, settings_of
from qlora_cli.models.gguf import unpack_gguf
from tests.conftest import DATA, MODEL, needs_data, needs_model

pytestmark = [pytest.mark.slow, needs_data, needs_model]

CELLS = [
    # The peak is in loading, and in the steps.
    make_cell("nf4", "fused", 1, batch=2, rows=64, checkpointing=True, steps=4),
    make_cell("none", "plain", 4, rows=64, steps=8),
]


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: f"{cell['held']}-{cell['kernels']}")
def test_the_peak_is_in_the_planned_range(cell: dict[str, Any]) -> None:
    unpack_gguf(MODEL)  # the cells are runs after the first one
    settings = settings_of(cell, str(DATA / "gsm8k/train.jsonl"), random="")
    planned, peak = plan_of(settings), measure(settings, cell)["peak"]
    assert planned["low"] <= peak <= planned["high"]
    assert planned["high"] <= 1.6 * planned["low"]
