"""The page of results, and the keys of its records."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

WAYS = ("float32", "ours", "peft")
"""The first is the reference."""

Record = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """Settings of one experiment, which is trained in three ways."""

    model: str
    base: str
    learning_rate: float
    r: int
    steps: int
    rows_per_step: int
    max_length: int
    seed: int


def untrained(cell: Cell) -> Cell:
    """Return the cell under which the untrained base is recorded."""
    return replace(cell, seed=0, steps=0, learning_rate=0.0, r=1)


def find(report: Mapping[str, Any], way: str, cell: Cell) -> Record | None:
    """Return the record of a cell trained in one way."""
    for record in report["runs"]:
        if record["way"] == way and record["cell"] == asdict(cell):
            return dict(record)
    return None


def as_markdown(report: Mapping[str, Any]) -> str:
    """Render the page: one row per setting, over the seeds with complete records."""
    settings = whole_settings(report)
    return "\n".join(
        [
            "<!-- Written by benchmarks/addition_order; run that instead of editing. -->",
            "# The update first, or the product first",
            "",
            *_about(report),
            "",
            "## Loss of each step against float32",
            "",
            "Difference from the float32 loss of the same step, in percent. Mean: absolute value, "
            "over all steps. Largest: the largest absolute value. End: signed mean over the last "
            "quarter (+ is worse than float32). In brackets: minimum and maximum over the seeds.",
            "",
            *_table(_training_rows(settings)),
            "",
            "## Held-out loss",
            "",
            "All adapters evaluated in float32, however they were trained.",
            "",
            *_table(_held_out_rows(settings, "held_out_float32")),
            "",
            "Each adapter evaluated as it was trained, with the same layers and dtype.",
            "",
            *_table(_held_out_rows(settings, "held_out_own")),
            "",
            "## How much of the update reaches the output",
            "",
            "(y - x W^T) . u / (u . u) in each adapted layer, with its output y in bfloat16 and "
            "its update u in float32. Mean over the layers, on two held-out rows.",
            "",
            *_table(_kept_rows(settings)),
            "",
            "## The curves",
            "",
            "Mean over the seeds. Ours and PEFT's are differences from float32, in percent.",
            "",
            *_table(_curve_rows(settings)),
            "",
        ]
    )


Setting = tuple[Cell, list[dict[str, Record]]]
"""A cell (of any seed), and for each seed the record of each way."""


def whole_settings(report: Mapping[str, Any]) -> list[Setting]:
    """Return the settings trained in all ways, with their seeds grouped."""
    found: dict[Cell, list[dict[str, Record]]] = {}
    for record in report["runs"]:
        if record["way"] != WAYS[0]:
            continue
        cell = Cell(**record["cell"])
        ways = {way: find(report, way, cell) for way in WAYS}
        ways["untrained"] = find(report, "untrained", untrained(cell))
        whole = {way: one for way, one in ways.items() if one is not None}
        if len(whole) == len(ways):
            found.setdefault(replace(cell, seed=0), []).append(whole)
    return sorted(found.items(), key=lambda item: (item[0].model, item[0].base, str(item[0])))


def _about(report: Mapping[str, Any]) -> list[str]:
    named = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return [
        "The same LoRA (alpha = 2 r, all linear layers, AdamW, linear decay) on the same rows of "
        "GSM8K, three ways: PEFT's layers in float32; ours in bfloat16, the update first; PEFT's "
        "in bfloat16, float32 adapter under autocast. Nothing else differs; all three use "
        "transformers' layers. Held out: rows of the test split. Seeds draw the adapter and the "
        "rows. "
        f"{report['processor']}, {report['threads']} thread(s), {named}, commit "
        f"{report['commit']}.",
        "",
        "```bash",
        report["command"],
        "```",
    ]


def _table(rows: list[list[str]]) -> list[str]:
    head, *rest = rows
    lines = [head, ["---"] * len(head), *rest]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _name(cell: Cell) -> list[str]:
    return [cell.model, cell.base, f"{cell.learning_rate:g}", str(cell.r)]


_NAMES = ["model", "base", "rate", "r"]


def _spread(values: Sequence[float], form: str) -> str:
    """Format the mean and, for several values, their minimum and maximum."""
    mean = format(statistics.mean(values), form)
    if len(values) == 1:
        return mean
    return f"{mean} ({min(values):{form}} to {max(values):{form}})"


def differences(way: Mapping[str, Any], reference: Mapping[str, Any]) -> list[float]:
    """Return how far each step's loss is above the reference's, in percent."""
    pairs = zip(way["losses"], reference["losses"], strict=True)
    return [100 * (found / expected - 1) for found, expected in pairs]


def _training_rows(settings: Sequence[Setting]) -> list[list[str]]:
    names = [f"{way}: {what}" for way in ("ours", "PEFT") for what in ("mean", "largest", "end")]
    rows = [[*_NAMES, "steps x rows", "seeds", *names]]
    for cell, seeds in settings:
        row = [*_name(cell), f"{cell.steps} x {cell.rows_per_step}", str(len(seeds))]
        for way in WAYS[1:]:
            curves = [differences(ways[way], ways["float32"]) for ways in seeds]
            last = cell.steps - max(1, cell.steps // 4)
            row += [
                _spread([statistics.mean(map(abs, curve)) for curve in curves], ".2f"),
                f"{max(abs(one) for curve in curves for one in curve):.2f}",
                _spread([statistics.mean(curve[last:]) for curve in curves], "+.2f"),
            ]
        rows.append(row)
    return rows


def _held_out_rows(settings: Sequence[Setting], key: str) -> list[list[str]]:
    rows = [
        [*_NAMES, "seeds", "untrained", "float32", "ours - float32", "PEFT - float32",
         "PEFT - ours, by seed"]
    ]  # fmt: skip
    for cell, seeds in settings:
        of = {way: [ways[way][key] for ways in seeds] for way in ("untrained", *WAYS)}

        def less(way: str, other: str, of: dict[str, list[float]] = of) -> list[float]:
            return [a - b for a, b in zip(of[way], of[other], strict=True)]

        rows.append(
            [
                *_name(cell),
                str(len(seeds)),
                f"{of['untrained'][0]:.4f}",
                _spread(of["float32"], ".4f"),
                _spread(less("ours", "float32"), "+.4f"),
                _spread(less("peft", "float32"), "+.4f"),
                _spread(less("peft", "ours"), "+.4f"),
            ]
        )
    return rows


def _kept_rows(settings: Sequence[Setting]) -> list[list[str]]:
    rows = [
        [
            *_NAMES,
            "ours: after 1 step",
            "ours: at the end",
            "PEFT: after 1 step",
            "PEFT: at the end",
        ]
    ]
    for cell, seeds in settings:
        shares = [
            _spread([ways[way]["kept"][str(step)] for ways in seeds], ".3f")
            for way in WAYS[1:]
            for step in (1, cell.steps)
        ]
        rows.append([*_name(cell), *shares])
    return rows


def _curve_rows(settings: Sequence[Setting]) -> list[list[str]]:
    longest = max((cell.steps for cell, _ in settings), default=1)
    steps = [1, *(step for step in (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64) if step <= longest)]
    rows = [[*_NAMES, "", *map(str, steps)]]
    for cell, seeds in settings:
        curves = {
            "float32": ([ways["float32"]["losses"] for ways in seeds], ".4f"),
            **{
                way: ([differences(ways[way], ways["float32"]) for ways in seeds], "+.2f")
                for way in WAYS[1:]
            },
        }
        for way, (several, form) in curves.items():
            cells = [
                format(statistics.mean(curve[step - 1] for curve in several), form)
                if step <= cell.steps
                else ""
                for step in steps
            ]
            rows.append([*_name(cell), {"peft": "PEFT"}.get(way, way), *cells])
    return rows
