"""Hold every page and picture that the project writes to the same rules.

Texts are measured with a width per character, so that no browser is needed.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import pytest

from benchmarks.claims.page import picture
from qlora_cli.common.report import ABSENT
from qlora_cli.common.svg import Scale, number_form, percent_form, tick_texts, wrap_text
from qlora_cli.compare.html import comparison_page
from qlora_cli.compare.report import (
    CellFailure,
    CellGeneration,
    CellMemory,
    CellReport,
    CompareReport,
    Latency,
    LossPoint,
)
from qlora_cli.compare.text import tables
from qlora_cli.data.prepared.findings import Finding
from qlora_cli.data.prepared.scan import DatasetScan
from qlora_cli.evaluate.bootstrap import Estimate
from qlora_cli.evaluate.report import MeasureInfo
from qlora_cli.inspect.preview_html import preview_page
from qlora_cli.inspect.preview_model import Sample, SourceView, SplitView, TextSpan
from qlora_cli.plan.html import plan_page
from qlora_cli.plan.plan import plan
from qlora_cli.plan.report import PlanReport
from qlora_cli.recipe.schema import Recipe
from qlora_cli.types import IGNORE_INDEX, Example
from tests.conftest import ROOT

LABELS = {
    "short": "a",
    "long": "adapter.target_modules=[q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj]",
    "unbroken": "x" * 300,
    "capitals": "WM" * 60,
    "cjk": "学習率を変えた実験の比較" * 8,
    "emoji": "🤗" * 60,
    "markup": "<script>alert('\"&</script><svg onload=x>",
}
VALUES: dict[str, list[float]] = {
    "usual": [0.81, 0.82, 0.815],
    "equal": [1.0, 1.0, 1.0],
    "zero": [0.0, 0.0, 0.0],
    "tiny": [1e-20, 2e-20, 3e-20],
    "subnormal": [5e-324, 0.0, 5e-324],
    "huge": [1e300, 2e300, 1.7e308],
    "close": [1e17, 1e17 + 16, 1e17 + 32],
    "negative": [-3.5, -1e-3, -1234567.0],
    "mixed signs": [-1.7e308, 0.0, 1.7e308],
    "one not finite": [math.nan, 0.5, math.inf],
    "none finite": [math.nan, math.inf, -math.inf],
}


def estimate(value: float, margin: float | None = 0.1) -> Estimate:
    """An estimate with an interval around it, if a margin is given."""
    if margin is None or not math.isfinite(value):
        return Estimate(value, None, None)
    width = abs(value) * margin
    return Estimate(value, value - width, value + width)


def a_cell(
    name: str, number: int, value: float, measure: str, margin: float | None = 0.1
) -> CellReport:
    """A finished cell."""
    curve = [LossPoint(i + 1, 10**i, 0.1 * i, value) for i in range(4)]
    speed = Latency(0.1, 20.0)
    return CellReport(
        name=name, recipe="recipe", method=None, settings={"adapter.r": str(2**number)},
        status="finished", failure=None, run=None, trained_weights=10, total_weights=100,
        trained_share=0.1, steps=4, tokens=1000, seconds=1.0, tokens_per_second=100.0,
        weights_bytes=1000, run_bytes=1000,
        memory=CellMemory(10**9, (10**9, 2 * 10**9), {"weights": 9 * 10**8, name: 10**8},
                          None, 2 * 10**9, 10**9),
        generation=CellGeneration(speed, speed, speed),
        results={measure: estimate(value, margin)},
        differences={measure: estimate(0.01, 2.0)} if number else None,
        base=None, from_base=None, curve=curve,
    )  # fmt: skip


def a_comparison(label: str, values: list[float], margin: float | None = 0.1) -> CompareReport:
    """A comparison whose cells, measure and folder have this name."""
    measure = f"{label} 0"
    cells = [a_cell(f"{label} {i}", i, value, measure, margin) for i, value in enumerate(values)]
    return CompareReport(
        folder=label, first=cells[0].name, varied=["adapter.r"],
        measures={measure: MeasureInfo(100, is_share=False, lower_is_better=True)},
        bases={}, confidence=0.95, resamples=2000, environment={}, cells=cells,
    )  # fmt: skip


def a_preview(label: str, values: list[float]) -> SplitView:
    """A split with a source, a token and a finding of this name; a row for each value."""
    scan = DatasetScan(added_token_ids={9}, bos_token_id=None, max_length=64)
    for number in range(len(values)):
        scan.add(Example([5] * (2 + number), [IGNORE_INDEX] + [5] * (1 + number)))
    audit = scan.audit()
    spans = [TextSpan(label, is_supervised=True, is_special=False)]
    source = SourceView(
        label, label, 10**9, 1, 0, 1, 2, "", "", audit.sources[0], [Sample(label, 1234, 2, spans)]
    )
    return SplitView(label, audit, [(label, 1)], [Finding(label, 1, 2, (label,))], [source])


@pytest.fixture(scope="module")
def planned(
    tiny_model: Path, tiny_rows: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> PlanReport:
    data = tmp_path_factory.mktemp("data") / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in tiny_rows), encoding="utf-8")
    document = {
        "model": {"path": str(tiny_model)},
        "adapter": {"type": "lora", "r": 4},
        "data": {"train": {"path": str(data)}, "max_length": 96},
        "output": {"dir": str(data.parent / "run")},
        "training": {"max_steps": 4, "batch_size": 4, "micro_batch_size": 2, "precision": "fp32"},
    }
    return plan(Recipe.model_validate(document), device="T4")


def a_plan(report: PlanReport, label: str, values: list[float]) -> PlanReport:
    """A plan with a device of this name, whose memory is near the peak."""
    peak = report.peak.bytes
    device = replace(report.device, name=label, bytes=peak + len(values))
    return replace(report, device=device, warnings=[label])


Writer = Callable[[PlanReport, str, list[float]], str]
WRITERS: dict[str, Writer] = {
    "qlora_cli/compare/html.py": lambda _, label, values: comparison_page(
        a_comparison(label, values)
    ),
    "qlora_cli/inspect/preview_html.py": lambda _, label, values: preview_page(
        [a_preview(label, values)], title=label
    ),
    "qlora_cli/plan/html.py": lambda report, label, values: plan_page(
        a_plan(report, label, values), title=label
    ),
    "benchmarks/claims/page.py": lambda _, label, values: picture(
        {
            "cells": [
                {"name": f"{label} {i}", "results": {"classification": estimate(v).to_json()}}
                for i, v in enumerate(values)
            ]
        }
    ),
}
PAGES = [name for name in WRITERS if name.startswith("qlora_cli")]


def test_every_writer_of_pages_is_held_to_the_rules() -> None:
    writes = re.compile(r"from qlora_cli\.common\.html import .*\bpage\b|<svg|<html", re.IGNORECASE)
    files = [
        f for part in ("qlora_cli", "benchmarks", "scripts") for f in (ROOT / part).rglob("*.py")
    ]
    found = {str(f.relative_to(ROOT)) for f in files if writes.search(f.read_text("utf-8"))}
    assert found - {"qlora_cli/common/html.py", "qlora_cli/common/svg.py"} == set(WRITERS)


class Text(NamedTuple):
    left: float
    right: float
    baseline: float
    words: str


def texts_of(svg: ElementTree.Element) -> Iterator[Text]:
    """Yield the extent of each text of a picture."""
    for one in svg.iter():
        if one.tag.endswith("text"):
            words = one.text or ""
            wide = sum(unicodedata.east_asian_width(c) in "WF" for c in words)
            width = 12 * (0.62 * (len(words) - wide) + wide)
            x, y = float(one.attrib["x"]), float(one.attrib["y"])
            before = {"start": 0.0, "middle": 0.5, "end": 1.0}[one.attrib["text-anchor"]]
            yield Text(x - before * width, x + (1 - before) * width, y, words)


def check_pictures(page: str) -> None:
    """Assert that all texts and shapes are inside of their picture, and that no texts overlap."""
    for source in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        svg = ElementTree.fromstring(source)
        _, _, width, height = map(float, svg.attrib["viewBox"].split())
        texts = list(texts_of(svg))
        for text in texts:
            assert text.left + 0.1 >= 0, text
            assert text.right <= width + 0.1, text
            assert 9 <= text.baseline <= height - 3, text
        for one, other in combinations(texts, 2):
            is_beside = one.right <= other.left + 0.1 or other.right <= one.left + 0.1
            assert is_beside or abs(one.baseline - other.baseline) >= 12, (one, other)
        for shape in svg.iter():
            for key, value in shape.attrib.items():
                if key in ("x", "x1", "x2", "cx"):
                    assert 0 <= float(value) <= width, (shape.tag, shape.attrib)
                elif key in ("y", "y1", "y2", "cy"):
                    assert 0 <= float(value) <= height, (shape.tag, shape.attrib)


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("label", LABELS)
def test_no_text_is_clipped_whatever_it_says(planned: PlanReport, writer: str, label: str) -> None:
    page = WRITERS[writer](planned, LABELS[label], VALUES["usual"])
    assert "<svg" in page or writer == "qlora_cli/inspect/preview_html.py"
    check_pictures(page)


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("values", VALUES)
def test_no_text_is_clipped_whatever_the_values(
    planned: PlanReport, writer: str, values: str
) -> None:
    check_pictures(WRITERS[writer](planned, "r=4", VALUES[values]))


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("number", [1, 2, 60])
def test_no_text_is_clipped_with_one_row_or_many(
    planned: PlanReport, writer: str, number: int
) -> None:
    values = [1 + i / 10 for i in range(number)]
    check_pictures(WRITERS[writer](planned, LABELS["long"], values))


@pytest.mark.parametrize("writer", WRITERS)
def test_text_is_escaped_and_nothing_comes_from_outside(planned: PlanReport, writer: str) -> None:
    page = WRITERS[writer](planned, LABELS["markup"], VALUES["usual"])
    assert "<script" not in page
    assert "<svg onload" not in page
    assert "&lt;script&gt;" in page
    page = page.replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert not re.search(r"\b(src|href)=|url\(|@import|https?:", page)


@pytest.mark.parametrize("writer", PAGES)
def test_a_page_has_a_narrow_layout_and_tables_that_scroll(
    planned: PlanReport, writer: str
) -> None:
    page = WRITERS[writer](planned, "r=4", VALUES["usual"])
    root = ElementTree.fromstring(page.removeprefix("<!doctype html>"))
    views = [one.get("content") for one in root.iter("meta") if one.get("name") == "viewport"]
    assert views == ["width=device-width, initial-scale=1"]
    assert "default-src 'none'" in page
    assert "prefers-color-scheme: dark" in page
    assert "@media print" in page
    # Pictures scale: they have a viewBox, and no size of their own.
    for svg in root.iter("svg"):
        assert svg.get("role") == "img"
        assert svg.findtext("title")
        assert svg.findtext("desc")
        assert not {"width", "height"} & set(svg.keys())
    scrolling = [one for one in root.iter("div") if one.get("class") == "wide"]
    for region in scrolling:
        assert region.get("role") == "region"
        assert region.get("tabindex") == "0"
        assert region.get("aria-label")
    within = [table for region in scrolling for table in region.iter("table")]
    assert within == list(root.iter("table")) != []
    assert "local," in page, "the shadow at the edge of a table that continues there"
    assert "svg line {" not in page, "a rule that would replace the colours of lines"


def test_rows_and_columns_without_a_value_are_left_out() -> None:
    report = a_comparison("r", VALUES["usual"])
    nothing = CellMemory(None, None, None, None, None, None)
    failed = replace(
        report.cells[2], status="failed", failure=CellFailure("broken", None), results=None,
        differences=None, generation=None, memory=nothing, trained_weights=None,
        trained_share=None, weights_bytes=None, tokens_per_second=None, seconds=None,
    )  # fmt: skip
    cells = [replace(c, generation=None) for c in report.cells[:2]]
    found = dict(tables(replace(report, cells=[*cells, failed])))
    assert [title.split(",")[0] for title in found] == [
        "training",
        "results",
        "difference from r 0",
    ]
    for table in found.values():
        assert all(set(row[1:]) != {"-"} for row in table)
        assert all(set(column[1:]) != {"-"} for column in zip(*table, strict=True))
    assert [row[0] for row in found["training"]] == ["", "r 0", "r 1", "r 2"]
    refused = CellGeneration(Latency(), Latency(), Latency(ABSENT, ABSENT, "no merge"))
    found = dict(tables(replace(report, cells=[replace(cells[0], generation=refused)])))
    head, row = found["generation, one prompt at a time"]
    assert head == ["", "first token, merged", "tokens/s, merged"]
    assert row == ["r 0", "refused", "refused"]


@pytest.mark.parametrize(
    ("low", "high", "lower_is_better", "words"),
    [
        (-0.1, 0.1, True, "Within noise of r 0 (the 95% interval of the difference contains zero)"),
        (0.0, 0.0, True, "Within noise of r 0"),
        (0.0, 0.1, False, "Within noise of r 0"),
        (-0.2, -0.1, True, "Better than r 0"),
        (0.1, 0.2, True, "Worse than r 0"),
        (0.1, 0.2, False, "Better than r 0"),
        (-0.2, -0.1, False, "Worse than r 0"),
        (-0.2, -0.1, None, "Lower than r 0"),
        (0.1, 0.2, None, "Higher than r 0"),
        (None, None, True, "No 95% interval of the paired difference from r 0 is known"),
        (math.nan, 0.2, True, "No 95% interval of the paired difference from r 0 is known"),
    ],
)
def test_each_plot_of_a_measure_says_what_is_within_noise(
    low: float | None, high: float | None, lower_is_better: bool | None, words: str
) -> None:
    report = a_comparison("r", VALUES["usual"])
    difference = {"r 0": Estimate(0.1, low, high)}
    report = replace(
        report,
        cells=[report.cells[0], *(replace(c, differences=difference) for c in report.cells[1:])],
        measures={"r 0": MeasureInfo(9, is_share=False, lower_is_better=lower_is_better)},
    )
    root = ElementTree.fromstring(comparison_page(report).removeprefix("<!doctype html>"))
    notes = {
        str(one.findtext("figcaption")): [note.text for note in one.iter("li")]
        for one in root.iter("figure")
    }
    for text in ("r 0, with 95% intervals", "r 0 by adapter.r, with 95% intervals"):
        (note,) = notes[text]
        assert str(note).startswith(words)
        assert str(note).endswith("r 1, r 2")


@pytest.mark.parametrize("margin", [0.1, None])
def test_measures_are_drawn_with_intervals_and_without_lines_between_them(
    margin: float | None,
) -> None:
    page = comparison_page(a_comparison("r", VALUES["usual"], margin))
    plots = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]
    measured = [svg for svg in plots if str(svg.findtext("title")).startswith("r 0")]
    assert len(measured) == 2
    for svg in measured:
        assert svg.find("polyline") is None
        bars = [line for line in svg.iter("line") if line.get("stroke-width") == "3"]
        assert len(bars) == (3 if margin else 0)
        assert all(str(bar.get("stroke")).startswith("#") for bar in bars)
        assert len(list(svg.iter("circle"))) == 3
        # Without an interval, the axis begins at zero: a cut axis makes noise look like an effect.
        shown = {text.words for text in texts_of(svg)}
        assert bool({"0.0", "0.00"} & shown) is (margin is None)
    assert ("no intervals are known" in page) is (margin is None)


def test_a_loss_that_is_not_finite_interrupts_its_line() -> None:
    report = a_comparison("r", VALUES["usual"])
    losses = (3.0, 2.0, math.nan, 1.0)
    curve = [LossPoint(i, i * 10, float(i), loss) for i, loss in enumerate(losses)]
    page = comparison_page(replace(report, cells=[replace(report.cells[0], curve=curve)]))
    assert page.count("<polyline") == 4
    assert "nan" not in page.replace("finance", "")
    assert json.dumps(VALUES["usual"][0]) in page


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("form", [number_form, percent_form])
def test_the_marks_of_an_axis_differ(
    values: list[float], form: Callable[[float, int], str]
) -> None:
    texts = tick_texts(Scale(values, 0, 100).ticks(), form)
    assert 2 <= len(texts) <= 8
    assert len(set(texts)) == len(texts)
    assert max(map(len, texts)) <= 24


@pytest.mark.parametrize("label", LABELS.values(), ids=LABELS)
def test_wrapping_keeps_every_character(label: str) -> None:
    assert "".join("".join(wrap_text(label, 100)).split()) == "".join(label.split())
