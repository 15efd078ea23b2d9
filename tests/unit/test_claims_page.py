"""Test the page of claims: its sentences follow its figures, and its recipes are valid."""

from __future__ import annotations

import subprocess
from itertools import combinations
from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks.claims.page import (
    cell_of,
    feed_forward,
    higher_rank,
    latency_added,
    latency_merged,
    less_memory,
    picture,
    share_of_parameters,
    within_one_percent,
)
from qlora_cli.common.svg import Scale
from qlora_cli.recipe.load import load_recipe
from tests.conftest import ROOT

FOLDER = ROOT / "benchmarks" / "claims"


def cell(method: str, accuracy: float = 0.8, **settings: str) -> dict[str, Any]:
    """A finished cell."""
    full = method == "full"
    return {
        "name": " ".join([method, *settings.values()]),
        "method": method,
        "settings": {f"adapter.{key}": value for key, value in settings.items()},
        "status": "finished",
        "trained_share": 1.0 if full else 0.01,
        "memory": {
            "planned_tensor_bytes": 1000 if full else 200,
            "measured_bytes": 2000 if full else 500,
        },
        "generation": {
            "base": {"tokens_per_second": 23.0},
            "tuned": {"tokens_per_second": 20.0},
            "merged": {"tokens_per_second": 22.8},
        },
        "results": {"classification": {"value": accuracy, "low": 0.7, "high": 0.9}},
    }


@pytest.mark.parametrize(
    ("low", "high", "holds"),
    [(-0.009, 0.009, True), (-0.05, 0.02, None), (-0.05, -0.02, False), (0.02, 0.05, False)],
)
def test_within_one_percent_is_decided_by_the_interval(
    low: float, high: float, holds: bool | None
) -> None:
    one = {"value": 0.0, "low": low, "high": high}
    assert within_one_percent([one]).holds is holds
    # What another seed says otherwise is not clear.
    other = {"value": 0.0, "low": -0.02, "high": 0.02}
    assert within_one_percent([one, other]).holds is None


def test_shares_memory_and_latency() -> None:
    full, lora = cell("full"), cell("lora", r="16")
    assert share_of_parameters({"cells": [full, lora]}).holds is True
    tiny = {**cell("ia3"), "trained_share": 0.0005}
    found = share_of_parameters({"cells": [full, lora, tiny]})
    assert (found.holds, found.found) == (False, "0.05% to 1.00%; 1 of 2 within")
    assert less_memory(full, lora).holds is True
    assert less_memory(lora, lora).holds is False
    light = {**full, "memory": {**full["memory"], "measured_bytes": 600}}
    assert less_memory(light, lora).holds is None
    assert latency_added("lora", lora).holds is True
    assert "+15% per token" in latency_added("lora", lora).found
    assert latency_merged(lora).holds is True
    slow = {**lora, "generation": {**lora["generation"], "merged": {"tokens_per_second": 20.0}}}
    assert latency_merged(slow).holds is False


NULLS = [
    {"value": None, "low": None, "high": None},
    {"value": 0.5, "low": None, "high": None},
]


@pytest.mark.parametrize("null", NULLS)
def test_an_estimate_without_value_or_interval_decides_nothing(null: dict[str, Any]) -> None:
    known = {"value": 0.0, "low": -0.005, "high": 0.005}
    found = within_one_percent([known, null])
    assert found.holds is None
    assert ("not finite" in found.found) is (null["value"] is None)
    both = [
        cell("lora", r="4", target_modules=t)
        for t in ("all-linear", "[q_proj,k_proj,v_proj,o_proj]")
    ]
    # What the page asks of comparisons, without files.
    (verdict,) = feed_forward(Some(null, *both))  # type: ignore[arg-type]
    assert verdict.holds is None
    empty = {**cell("lora", r="4"), "results": {"classification": null}}
    svg = ElementTree.fromstring(picture({"cells": [cell("full"), empty]}))
    words = [text.text for text in svg.iter("{http://www.w3.org/2000/svg}text")]
    assert ("not finite" in words) is (null["value"] is None)


class Some:
    """Comparisons, with as much of them as a sentence asks for."""

    def __init__(self, difference: dict[str, float], *cells: dict[str, Any]) -> None:
        self.sst2 = self.gsm8k = {"cells": cells}
        self.seeds: dict[str, Any] = {"cells": []}
        self._difference = difference

    def difference(self, *_: object) -> dict[str, float]:
        return self._difference


def test_rank_and_targets() -> None:
    def ranks(*accuracies: float) -> Any:
        cells = [
            cell("lora", accuracy, r=rank, target_modules="all-linear")
            for rank, accuracy in zip(("4", "16", "64"), accuracies, strict=True)
        ]
        # What the page asks of comparisons, without files.
        return higher_rank(Some({}, *cells))  # type: ignore[arg-type]

    assert ranks(0.9, 0.8, 0.7).holds is True
    assert ranks(0.7, 0.8, 0.9).holds is False
    assert ranks(0.8, 0.9, 0.8).holds is None
    both = [
        cell("lora", r="4", target_modules=t)
        for t in ("all-linear", "[q_proj,k_proj,v_proj,o_proj]")
    ]
    for low, high, holds in ((-0.2, -0.1, True), (0.1, 0.2, False), (-0.1, 0.1, None)):
        some = Some({"value": 0.0, "low": low, "high": high}, *both)
        # As above.
        (found,) = feed_forward(some)  # type: ignore[arg-type]
        assert found.holds is holds


def test_a_cell_is_found_by_what_it_is() -> None:
    failed = {**cell("lora", r="4"), "status": "failed"}
    report = {"cells": [failed, cell("lora", r="4", target_modules="x"), cell("full")]}
    assert cell_of(report, "lora", r="4") is report["cells"][1]
    assert cell_of(report, "lora", r="8") is None


def test_the_picture_is_an_image_of_its_own() -> None:
    svg = ElementTree.fromstring(picture({"cells": [cell("full"), cell("lora", 0.9, r="4")]}))
    names = [dot[0].text for dot in svg.iter("{http://www.w3.org/2000/svg}circle")]
    assert names == ["full: 80.0% [70.0%, 90.0%]", "lora 4: 90.0% [70.0%, 90.0%]"]


def test_recipes_and_script_of_the_page_exist() -> None:
    recipes = sorted(FOLDER.glob("*.yaml"))
    assert recipes
    for path in recipes:
        assert load_recipe(path).recipe.evaluation.forgetting is not None
    script = FOLDER / "run.sh"
    subprocess.run(["bash", "-n", script], check=True)
    told = subprocess.run([script, "--help"], capture_output=True, text=True, check=True)
    assert told.stdout.startswith("Usage: benchmarks/claims/run.sh DATA")
    assert subprocess.run([script], capture_output=True, check=False).returncode == 2


def test_an_axis_has_marks_whatever_round_numbers_it_ends_at() -> None:
    for low, high in combinations(range(201), 2):
        scale = Scale([low / 200, high / 200], 0, 100)
        assert 2 <= len(scale.ticks()) <= 8
