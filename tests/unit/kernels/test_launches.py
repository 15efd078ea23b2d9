"""Test what a decoder layer launches on a card, counted on a CPU (benchmarks/launches.py)."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.launches import VARIANTS, Launches, Variant, count_launches, page, save_models


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_models(folder)
    return folder


LIMITS = {
    "nf4, compiled, all recomputed": (125, 120),
    "nf4, compiled, feed-forward half recomputed": (110, 105),
    "nf4, compiled, all kept": (105, 100),
    "none, compiled, all recomputed": (110, 100),
}
"""Launches of a layer in the first micro-batch of a step, and in each further one.

16-bit weights are merged on a card only: 15 of their launches here are copies.
"""


@pytest.mark.parametrize("name", LIMITS)
def test_launches_of_a_layer(models: Path, name: str) -> None:
    [variant] = [one for one in VARIANTS if one.name == name]
    found = count_launches(models, variant)
    first, further = LIMITS[name]
    assert found.first.total() <= first, found.first
    assert found.further.total() <= further, found.further


@pytest.mark.parametrize(
    ("checkpointing", "weights", "calls"), [(True, 20, 11), ("mlp", 16, 9), (False, 14, 8)]
)
def test_each_weight_is_dequantized_once_in_each_direction(
    models: Path, checkpointing: bool | str, weights: int, calls: int
) -> None:
    """Seven forward and seven backward, and what is recomputed: all but down_proj, or gate and up.

    Queries, keys and values are one call, and gate and up another.
    """
    found = count_launches(models, Variant("nf4", "fused", checkpointing))
    assert found.dequantized == weights
    assert found.further["bitsandbytes::dequantize_4bit"] == calls
    assert found.further["bitsandbytes::dequantize_blockwise"] == calls


def test_a_page_has_a_row_for_each_variant(models: Path) -> None:
    variant = Variant("none", "fused", True)
    found = count_launches(models, variant)
    assert isinstance(found, Launches)
    row = page([(variant, found, 12.4)]).splitlines()[-1]
    assert row.startswith(f"| none, fused, all recomputed | {found.first.total()} |")
    assert row.endswith(f"| 0 | 0 | 45 | {found.operations:.0f} | 12 |")
    assert found.operations > found.further.total()
