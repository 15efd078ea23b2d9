"""Test the picture of a plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from qlora_cli.plan.html import plan_page
from qlora_cli.plan.plan import plan
from qlora_cli.recipe.schema import Recipe
from tests.conftest import output_of


def test_picture_shows_the_figures_of_the_plan(
    write_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    recipe = write_recipe(
        quantization={"type": "nf4"}, optimizer={"type": "paged_adamw_8bit"}, data={"packing": True}
    )
    page = tmp_path / "plan.html"
    report = output_of(capsys, "plan", recipe, "--device", "T4", "--html", page)
    for stage, entry in report["stages"].items():
        moments = [m for m in report["timeline"] if m["stage"] == stage]
        assert max(m["bytes"] for m in moments) == entry["bytes"]
        assert all(sum(m["kinds"].values()) == m["bytes"] for m in moments)
    parts = [m["during"] for m in report["timeline"] if (m["stage"], m["turn"]) == ("step", 1)]
    assert parts == sorted(parts, key=["forward", "backward", "between", "update"].index)

    text = page.read_text(encoding="utf-8")
    root = ElementTree.fromstring(text.removeprefix("<!doctype html>"))
    assert not [one.tag for one in root.iter() if one.tag in ("script", "link", "img")]
    assert "http:" not in text
    assert "https:" not in text
    cells = [["".join(cell.itertext()) for cell in row] for row in root.iter("tr")]
    sizes = {row[0]: int(row[2].replace(",", "")) for row in cells[1:]}
    assert sizes.pop("all tensors") == sum(sizes.values()) == report["peak"]["bytes"]
    assert {k: v for k, v in sizes.items() if v} == report["peak"]["kinds"]
    drawn = {shape.findtext("title") for shape in root.iter("polygon")}
    assert set(report["peak"]["kinds"]) <= drawn <= set(sizes)
    assert "T4 has 14.60 GiB, which is beyond the picture" in text
    told = root.find(".//desc")
    assert told is not None
    assert str(report["peak"]["stage"]) in str(told.text)


def test_highest_point_of_the_picture_is_the_peak(tiny_recipe: Callable[..., Recipe]) -> None:
    report = plan(tiny_recipe(), device="T4")
    device = replace(report.device, bytes=report.peak.bytes * 2)
    root = ElementTree.fromstring(
        plan_page(replace(report, device=device), title="t").removeprefix("<!doctype html>")
    )
    ys = [float(c.split(",")[1]) for p in root.iter("polygon") for c in p.attrib["points"].split()]
    zero, peak, line_of_device = (float(line.attrib["y1"]) for line in root.iter("line"))
    assert min(ys) == peak
    assert max(ys) == zero
    assert zero - line_of_device == pytest.approx(2 * (zero - peak), rel=1e-2)
