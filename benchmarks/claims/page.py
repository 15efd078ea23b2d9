"""Write docs/comparison.md and its plot from the comparisons of run.sh.

python -m benchmarks.claims.page runs/claims
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from pydantic import TypeAdapter

from qlora_cli.common.formatting import interval_text
from qlora_cli.common.svg import percent_form
from qlora_cli.compare.report import CompareReport
from qlora_cli.compare.svg_plots import Interval, interval_plot
from qlora_cli.compare.text import failures, tables
from qlora_cli.evaluate.evaluate import choose_tasks
from qlora_cli.evaluate.report import summarize
from qlora_cli.recipe.load import load_recipe
from qlora_cli.tasks.task import Outcome

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "comparison.md"
PICTURE = PAGE.with_suffix(".svg")

ACCURACY, LOSS = "classification", "loss"
ATTENTION = "[q_proj,k_proj,v_proj,o_proj]"
ADAPTERS = ("lora", "bottleneck", "ia3", "bitfit")

HEAD = """\
<!-- Written by benchmarks/claims/run.sh; run that instead of editing. -->
# Methods compared

SmolLM2-135M-Instruct, each method on the same rows, seed and budget: {sst2} rows of SST-2, and
{gsm8k} of GSM8K. This is one small model with little data and short runs, so the findings may not
hold for other models; run the same command for yours. All figures come from `qlora compare`;
[compare.md](compare.md) explains the columns.

```bash
benchmarks/claims/run.sh FOLDER_WITH_DATA
```

![Accuracy of each method on SST-2, with 95% intervals](comparison.svg)
"""
STYLE = (
    "<style>svg { background: #fff; color: #222; } text { font: 12px sans-serif; fill: "
    "currentColor; } .grid { stroke: currentColor; stroke-opacity: .15; } "
    "@media (prefers-color-scheme: dark) { svg { background: #181818; color: #ddd; } }</style>"
)

Report = Mapping[str, Any]
Cell = Mapping[str, Any]
Estimate = Mapping[str, float | None]


@dataclass(frozen=True)
class Comparisons:
    """The comparisons that run.sh made."""

    root: Path
    sst2: Report
    gsm8k: Report
    seeds: Report

    @classmethod
    def read(cls, root: Path) -> Comparisons:
        """Read the comparisons in a folder."""
        names = ("sst2", "gsm8k", "seeds")
        found = [json.loads((root / n / "comparison.json").read_text("utf-8")) for n in names]
        return cls(root, *found)

    def difference(self, name: str, first: Cell, other: Cell, measure: str) -> Estimate:
        """Estimate `other` minus `first` in one measure, paired.

        Args:
            name: name of the comparison.
        """
        recipe = load_recipe(Path(first["run"]) / "recipe.yaml").recipe
        tasks = choose_tasks(recipe, None, is_tuned=True)
        answers = {key: self._answers(name, one) for key, one in (("a", first), ("b", other))}
        found: Estimate = summarize(tasks, answers).to_json()["differences"][measure]
        return found

    def _answers(self, name: str, cell: Cell) -> dict[str, list[Outcome]]:
        path = self.root / name / "measured" / f"{Path(cell['run']).name}.answers.json"
        return {
            task: [Outcome(place, "", "", "", values) for place, values in rows]
            for task, rows in json.loads(path.read_text("utf-8")).items()
        }


def cell_of(report: Report, method: str, **settings: str) -> Cell | None:
    """Find the finished cell with these settings (by the last part of their keys)."""
    for cell in report["cells"]:
        known = {key.rpartition(".")[2]: value for key, value in cell["settings"].items()}
        is_like = cell["method"] == method and settings.items() <= known.items()
        if is_like and cell["status"] == "finished":
            found: Cell = cell
            return found
    return None


@dataclass(frozen=True)
class Verdict:
    """A common claim about methods, and what was measured."""

    sentence: str
    found: str
    holds: bool | None
    """None if the figures do not decide it."""

    def __str__(self) -> str:
        verdict = {True: "holds here", False: "does not hold here", None: "not clear"}[self.holds]
        return f"| {self.sentence} | **{verdict}** | {self.found} |"


def verdicts(all_: Comparisons) -> Iterator[Verdict]:
    """Yield each claim whose cells exist, with its figures."""
    full = cell_of(all_.sst2, "full")
    lora = cell_of(all_.sst2, "lora", r="16", target_modules="all-linear")
    nf4 = cell_of(all_.sst2, "nf4", double_quant="true")
    if full and lora:
        yield within_one_percent([lora["differences"][ACCURACY], *_of_other_seeds(all_)])
    yield share_of_parameters(all_.sst2)
    if full and nf4:
        yield less_memory(full, nf4)
    for method in ("bottleneck", "lora"):
        if cell := cell_of(all_.sst2, method):
            yield latency_added(method, cell)
    if lora:
        yield latency_merged(lora)
    if rank := higher_rank(all_):
        yield rank
    yield from feed_forward(all_)


def _of_other_seeds(all_: Comparisons) -> Iterator[Estimate]:
    """Yield the accuracy of LoRA r=16 minus full, for the other seeds."""
    for seed in ("1", "2"):
        full = cell_of(all_.seeds, "full", seed=seed)
        lora = cell_of(all_.seeds, "lora", r="16", seed=seed)
        if full and lora:
            yield all_.difference("seeds", full, lora, ACCURACY)


def within_one_percent(differences: Sequence[Estimate]) -> Verdict:
    """Decide from the paired difference in accuracy of each seed.

    If the seeds disagree, the figures do not decide the claim.
    """
    lows, highs = (_known(differences, key) for key in ("low", "high"))
    is_known = len(lows) == len(highs) == len(differences)
    is_outside = is_known and (max(highs) < -0.01 or min(lows) > 0.01)
    is_inside = is_known and min(lows) > -0.01 and max(highs) < 0.01
    text = ", ".join(map(_points, differences))
    return Verdict(
        "LoRA is within 1% of full fine-tuning",
        f"accuracy on SST-2, LoRA r=16 minus full, {len(differences)} seeds: {text}",
        is_inside if is_inside or is_outside else None,
    )


def _known(estimates: Sequence[Estimate], key: str) -> list[float]:
    """Return the values of a key that are not null."""
    return [value for each in estimates if (value := each[key]) is not None]


def share_of_parameters(report: Report) -> Verdict:
    """Compare the share of trained weights of all adapters."""
    done = [c for c in report["cells"] if c["method"] in ADAPTERS and c["status"] == "finished"]
    shares = [cell["trained_share"] for cell in done]
    inside = sum(0.002 <= share <= 0.05 for share in shares)
    return Verdict(
        "Adapters train 0.2 to 5% of the parameters",
        f"{min(shares):.2%} to {max(shares):.2%}; {inside} of {len(shares)} within",
        inside == len(shares),
    )


def less_memory(full: Cell, quantized: Cell) -> Verdict:
    """Compare the planned memory of tensors, and the measured memory of processes."""
    less = [
        1 - quantized["memory"][key] / full["memory"][key]
        for key in ("planned_tensor_bytes", "measured_bytes")
    ]
    return Verdict(
        "QLoRA needs 70% less memory than full fine-tuning",
        f"{less[0]:.0%} less for tensors (planned), {less[1]:.0%} less for the process (measured)",
        None if min(less) < 0.7 <= max(less) else min(less) >= 0.7,
    )


def latency_added(method: str, cell: Cell) -> Verdict:
    """Compare the time per token of the unmerged model and the base."""
    base, tuned = (cell["generation"][m]["tokens_per_second"] for m in ("base", "tuned"))
    added = base / tuned - 1
    return Verdict(
        f"An adapter ({method}, unmerged) adds 10 to 20% latency",
        f"{cell['name']}: {added:+.0%} per token ({base:.1f} to {tuned:.1f} tokens/s)",
        0.1 <= added <= 0.2,
    )


def latency_merged(cell: Cell) -> Verdict:
    """Compare the time per token of the merged model and the base."""
    base, merged = (cell["generation"][m]["tokens_per_second"] for m in ("base", "merged"))
    added = base / merged - 1
    return Verdict(
        "Merged LoRA adds no latency",
        f"{cell['name']}: {added:+.0%} per token ({base:.1f} to {merged:.1f} tokens/s)",
        abs(added) < 0.05,
    )


def higher_rank(all_: Comparisons) -> Verdict | None:
    """Compare accuracy by rank, as the mean over seeds."""
    by_rank = {}
    for rank in ("4", "16", "64"):
        cells = [
            cell_of(all_.sst2, "lora", r=rank, target_modules="all-linear"),
            *(cell_of(all_.seeds, "lora", r=rank, seed=seed) for seed in ("1", "2")),
        ]
        values = _known([cell["results"][ACCURACY] for cell in cells if cell], "value")
        if values:
            by_rank[rank] = values
    if len(by_rank) < 2:
        return None
    means = {rank: mean(values) for rank, values in by_rank.items()}
    text = ", ".join(
        f"r={rank} {means[rank]:.1%} ({min(v):.1%} to {max(v):.1%}, {len(v)} seeds)"
        for rank, v in by_rank.items()
    )
    first, *_, last = by_rank.values()
    # Decided only if the ranges over the seeds do not overlap.
    holds = False if min(last) > max(first) else True if max(last) < min(first) else None
    return Verdict("A higher rank is not always better", f"accuracy on SST-2: {text}", holds)


def feed_forward(all_: Comparisons) -> Iterator[Verdict]:
    """Compare all linear layers with attention only, at each rank, on arithmetic."""
    for rank in ("4", "16", "64"):
        attention = cell_of(all_.gsm8k, "lora", r=rank, target_modules=ATTENTION)
        linear = cell_of(all_.gsm8k, "lora", r=rank, target_modules="all-linear")
        if attention and linear:
            found = all_.difference("gsm8k", attention, linear, LOSS)
            low, high = found["low"], found["high"]
            holds = None if low is None or high is None or low <= 0 <= high else high < 0
            text = interval_text(found, is_share=False, sign="+")
            yield Verdict(
                f"Feed-forward layers help reasoning (r={rank})",
                f"loss on GSM8K, all layers minus attention: {text}",
                holds,
            )


def _points(difference: Estimate) -> str:
    value, low, high = (difference[key] for key in ("value", "low", "high"))
    if value is None:
        return "not finite"
    interval = "" if low is None or high is None else f" [{100 * low:+.1f}, {100 * high:+.1f}]"
    return f"{100 * value:+.1f} points{interval}"


def as_markdown(all_: Comparisons, rows: Mapping[str, int]) -> str:
    """Return the whole page."""
    lines = [HEAD.format(**rows), "## Common claims, and what was measured", ""]
    lines += ["| claim | | measured |", "|---|---|---|", *map(str, verdicts(all_)), ""]
    lines += [
        "*Holds* and *does not hold* are decided by the 95% interval where there is one; *not "
        "clear* means that the interval allows both.",
        "",
    ]
    about = {"sst2": "SST-2", "gsm8k": "GSM8K", "seeds": "SST-2 with other seeds"}
    for name, title in about.items():
        lines += _comparison(title, getattr(all_, name))
    lines += ["## Environment", "", _environment(all_.sst2["environment"]), ""]
    return "\n".join(lines)


def _comparison(title: str, document: Report) -> Iterator[str]:
    report = TypeAdapter(CompareReport).validate_python(_finite_or_nan(document))
    yield f"## {title}\n"
    for name, (head, *rows) in tables(report):
        yield f"### {title}: {name}\n"
        yield _row(head)
        yield _row(["---"] * len(head))
        yield from map(_row, rows)
        yield ""
    for name, why in failures(report):
        yield f"- {name}: {' '.join(why.split())}"
    yield ""


def _finite_or_nan(value: Any) -> Any:
    """Replace the null value of an estimate, which stands for a number that is not finite."""
    if isinstance(value, list):
        return [_finite_or_nan(one) for one in value]
    if not isinstance(value, dict):
        return value
    found = {key: _finite_or_nan(one) for key, one in value.items()}
    is_estimate = found.keys() == {"value", "low", "high"}
    return {**found, "value": math.nan} if is_estimate and found["value"] is None else found


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _environment(known: Mapping[str, Any]) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in known["packages"].items())
    commit = f"Commit {known['commit']}; " if known["commit"] else ""
    return f"{commit}{known['threads']} threads; {packages}."


def picture(report: Report) -> str:
    """Plot the accuracy of each cell as a separate image."""
    intervals = [
        Interval(cell["name"], **cell["results"][ACCURACY])
        for cell in report["cells"]
        if ACCURACY in (cell["results"] or {})
    ]
    title = "Accuracy on SST-2, with 95% intervals"
    plot = interval_plot(title, intervals, form=percent_form)
    first, rest = plot.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1).split("\n", 1)
    return f"{first}\n{STYLE}\n{rest}\n"


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description="Write docs/comparison.md and its picture.")
    parser.add_argument("folder", type=Path, help="folder that run.sh wrote")
    all_ = Comparisons.read(parser.parse_args().folder)
    here = Path(__file__).parent
    recipes = {name: load_recipe(here / f"{name}.yaml").recipe for name in ("sst2", "gsm8k")}
    rows = {name: recipe.data.train_sources[0].limit or 0 for name, recipe in recipes.items()}
    PAGE.write_text(as_markdown(all_, rows), encoding="utf-8")
    PICTURE.write_text(picture(all_.sst2), encoding="utf-8")


if __name__ == "__main__":
    main()
