"""Check that losses stay as they are: a change of them is a change of the mathematics.

`python scripts/regen_golden.py` writes them anew; the commit that does so says why they changed.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.golden.runs import KEPT, KEPT_KINDS, losses


def test_every_kind_of_run_has_golden_losses() -> None:
    assert set(json.loads(KEPT.read_text(encoding="utf-8"))) == set(KEPT_KINDS)


@pytest.mark.parametrize("kind", KEPT_KINDS)
def test_losses_equal_the_golden_ones(kind: str, tmp_path: Path) -> None:
    kept = json.loads(KEPT.read_text(encoding="utf-8"))[kind]
    # Processors order float32 sums differently; int8 turns that into other roundings.
    assert losses(kind, tmp_path) == pytest.approx(kept, rel=2e-3 if kind == "int8" else 2e-5)
