"""Render the page and the README's table from the report of a race."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.race.figures import Figures
from benchmarks.race.machine import MOST_BY_OTHERS

Report = Mapping[str, Any]

BEGIN, END = "<!-- race: begin -->", "<!-- race: end -->"


def as_markdown(report: Report) -> str:
    """Render the whole page."""
    sizes = report["sizes"]
    lines = [
        "<!-- Written by `python -m benchmarks.race`; run that instead of editing. -->",
        "# The race",
        "",
        f"{report['model']}; NF4 with double quantization, LoRA r={sizes['r']} "
        f"alpha={sizes['alpha']} on all linear layers; GSM8K, {sizes['rows_per_step']} rows a "
        f"step, {sizes['micro_batch']} a forward, loss on the answers alone. "
        f"{report['processor']}, {report['processors']} processors. Commit {report['commit']}. "
        f"{report['note']}".rstrip(),
        "",
        "```bash",
        report["command"].strip(),
        "```",
        "",
        *_explained(report),
    ]
    for race in report.get("races", []):
        lines += _race(race)
    lines += _growth(report.get("growth", []))
    lines += ["## Versions", ""]
    for kind, found in report["versions"].items():
        lines.append(f"- {kind}: " + ", ".join(f"{name} {v}" for name, v in found.items()))
    return "\n".join(lines) + "\n"


def readme_table(report: Report) -> str:
    """Render the short table: speed, memory and losses of the race with the most threads."""
    race = report["races"][-1]
    rows = [
        [
            f"`{name}`: {race['about'][name]}",
            f"{f['tokens_per_second']:,.0f}",
            f"{f['peak_mb']:,.0f}",
            f"{f['above_loaded_mb']:,.0f}",
            f"{f['seconds_to_first_step']:.0f}",
            _percent(f["loss_difference"], 2),
        ]
        for name, f in race["results"].items()
        if "failed" not in f
    ]
    titles = ["", "tokens/s", "peak MiB", "above the model", "s to first step", "loss off float32"]
    where = f"{report['processor']}, {race['threads']} threads; commit {report['commit']}."
    return "\n".join([*table(titles, rows), "", where])


def put_between(text: str, inserted: str) -> str:
    """Replace the text between the two marks.

    Raises:
        ValueError: the marks are not there, once each and in order.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in after or END in after:
        raise ValueError(f"the page needs {BEGIN} and {END}, once each and in this order")
    return f"{before}{BEGIN}\n{inserted}\n{END}{after}"


def _explained(report: Report) -> list[str]:
    return [
        f"Each contestant runs in its own process, {report['repetitions']} times in turn. "
        f"Steps that do not count: the first {report['warmup']} of each run. Tokens are those of "
        "the rows, without padding. Speed and processor time are medians, with the lowest and the "
        "highest. Memory is the peak of resident memory: in total, above an interpreter with the "
        "same imports, and above the loaded model. The loss is the largest relative difference of "
        "a step from the same work in float32 (`other rows`: TRL's packing makes other steps). A "
        "run is marked busy if other processes used more than "
        f"{MOST_BY_OTHERS:.0%} of the processors.",
        "",
    ]


def _race(race: Mapping[str, Any]) -> list[str]:
    rows, floor = race["rows"], race["floor"]
    lines = [
        f"## {race['threads']} thread{'s' if race['threads'] > 1 else ''}",
        "",
        f"{rows['steps']} steps, {rows['tokens']:,} tokens ({rows['supervised']:,} supervised) in "
        f"rows of {rows['shortest']} to {rows['longest']}.",
        "",
        *_results(race["results"], race["about"]),
        "",
        *_floor(floor),
    ]
    if race["heats"]:
        lines += ["", "TRL's settings, in a short heat:", "", *_heats(race["heats"])]
    lines += ["", "Losses, step by step:", "", *_losses(race), ""]
    return lines


def _results(results: Mapping[str, Figures], about: Mapping[str, str]) -> list[str]:
    titles = [
        "contestant", "tokens/s", "processor s per 1,000 tokens", "peak MiB",
        "above interpreter", "above model", "s to first step", "share of floor",
        "loss against float32", "marks",
    ]  # fmt: skip
    rows = []
    for name, f in results.items():
        label = f"`{name}`: {about[name]}"
        if "failed" in f:
            rows.append([label, "failed: " + f["failed"].splitlines()[-1], *[""] * 8])
            continue
        rows.append(
            [
                label,
                _spread(f, "tokens_per_second", 0),
                _spread(f, "cpu_seconds_per_1000_tokens", 2),
                f"{f['peak_mb']:,.0f}",
                f"{f['above_interpreter_mb']:,.0f}",
                f"{f['above_loaded_mb']:,.0f}",
                f"{f['seconds_to_first_step']:.1f}",
                _percent(f["share_of_floor"], 0),
                _percent(f["loss_difference"], 2),
                _marks(f),
            ]
        )
    return table(titles, rows)


def _floor(floor: Mapping[str, Any]) -> list[str]:
    seconds, rates = floor["seconds_per_step"], floor["rates"]
    parts = ", ".join(
        f"{name} {value:.2f} s" for name, value in seconds.items() if name not in ("all",)
    )
    return [
        f"The floor is {seconds['all']:.2f} s a step, {floor['tokens_per_second']:,.0f} tokens a "
        f"second: {parts}; at {rates['linears_per_second'] / 1e9:,.0f} GFLOP/s in the linear "
        f"layers and {rates['head_per_second'] / 1e9:,.0f} in the head, "
        "measured for these shapes in this run."
    ]


def _heats(heats: Mapping[str, Figures]) -> list[str]:
    rows = [
        [f"`{name}`", "failed: " + f["failed"].splitlines()[-1], ""]
        if "failed" in f
        else [f"`{name}`", f"{f['tokens_per_second']:,.0f}", f"{f['peak_mb']:,.0f}"]
        for name, f in heats.items()
    ]
    return table(["setting", "tokens/s", "peak MiB"], rows)


def _losses(race: Mapping[str, Any]) -> list[str]:
    reference = race["reference_losses"]
    rows = [["float32", *(f"{loss:.4f}" for loss in reference)]]
    for name, f in race["results"].items():
        if "failed" not in f and f["loss_difference"] is not None:
            rows.append([f"`{name}`", *(f"{loss:.4f}" for loss in f["losses"])])
    return table(["step", *(str(i + 1) for i in range(len(reference)))], rows)


def _growth(points: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = []
    for by in dict.fromkeys(point["by"] for point in points):
        rows = [
            [f"{p['value']:,}", f"`{p['contestant']}`", str(p["threads"]), *_point(p)]
            for p in points
            if p["by"] == by
        ]
        name = by.replace("_", " ")
        titles = [name, "contestant", "threads", "tokens/s", "peak MiB", "above model"]
        lines += [f"## By {name}", "", *table(titles, rows), ""]
    return lines


def _point(point: Mapping[str, Any]) -> list[str]:
    if "failed" in point:
        return ["failed: " + point["failed"].splitlines()[-1], "", ""]
    mark = " (busy)" if point["is_busy"] else ""
    return [
        f"{point['tokens_per_second']:,.0f}{mark}",
        f"{point['peak_mb']:,.0f}",
        f"{point['above_loaded_mb']:,.0f}",
    ]


def _marks(figures: Figures) -> str:
    marks = []
    if figures["is_busy"]:
        # Older reports hold a median, which says nothing of the run that was busy.
        most = figures.get("others_share_most")
        marks.append("busy" if most is None else f"busy: others had up to {most:.0%}")
    if figures["num_failed"]:
        marks.append(f"{figures['num_failed']} failed")
    if figures.get("trained_dtypes", ["float32"]) != ["float32"]:
        marks.append(f"adapter in {', '.join(figures['trained_dtypes'])}")
    return "; ".join(marks)


def _spread(figures: Figures, key: str, digits: int) -> str:
    low, high = figures[f"{key}_spread"]
    middle = f"{figures[key]:,.{digits}f}"
    if figures["repetitions"] == 1:
        return middle
    return f"{middle} ({low:,.{digits}f} to {high:,.{digits}f})"


def _percent(value: float | None, digits: int) -> str:
    return "other rows" if value is None else f"{value:.{digits}%}"


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table."""
    return [
        "| " + " | ".join(titles) + " |",
        "|---" * len(titles) + "|",
        *("| " + " | ".join(row) + " |" for row in rows),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the table of a race between its marks.")
    parser.add_argument("report", type=Path, help="race.json")
    parser.add_argument("page", type=Path, help="the page with the marks, such as README.md")
    options = parser.parse_args()
    report = json.loads(options.report.read_text(encoding="utf-8"))
    text = options.page.read_text(encoding="utf-8")
    options.page.write_text(put_between(text, readme_table(report)), encoding="utf-8")


if __name__ == "__main__":
    main()
