"""The table of an evaluation: on the terminal, and in the model card of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qlora_cli.common.formatting import align_table, interval_text


def evaluation_table(report: Mapping[str, Any]) -> str:
    """Format an evaluation: a row for each measure, a column for each model.

    Args:
        report: as `evaluate` returns it, and as run.json keeps it.
    """
    models, measures, differences = report["models"], report["measures"], report["differences"]
    names = list(models)
    head = ["", "n", *names]
    if differences:
        head += [f"{names[1]} - {names[0]}", ""]
    rows = [head]
    for name, measure in measures.items():
        is_share = measure["is_share"]
        cells = [interval_text(model[name], is_share=is_share) for model in models.values()]
        if differences:
            difference = differences.get(name)
            cells += (
                ["", ""]
                if difference is None
                else [
                    interval_text(difference, is_share=is_share, sign="+"),
                    _verdict(difference, measure["lower_is_better"]),
                ]
            )
        rows.append([name, f"{measure['n']:,}", *cells])
    interval = f"with {report['confidence']:.0%} intervals (bootstrap over the examples)"
    lines = [f"{report['target']}: {interval}", *align_table(rows)]
    for model, table in report.get("confusion", {}).items():
        lines += ["", *_confusion(model, table)]
    return "\n".join(lines)


def _confusion(model: str, table: Mapping[str, Any]) -> list[str]:
    """Format the predictions of a classifier: a row for each label."""
    labels = table["labels"]
    rows = [["label", *(f"-> {label}" for label in labels)]]
    rows += [
        [label, *(f"{count:,}" for count in counts)]
        for label, counts in zip(labels, table["counts"], strict=True)
    ]
    return [f"{model}: rows by label and predicted label", *align_table(rows)]


def _verdict(difference: Mapping[str, Any], lower_is_better: bool | None) -> str:
    """Judge a difference: it is clear where zero is outside its interval."""
    low, high = difference["low"], difference["high"]
    if lower_is_better is None:
        return ""
    if low is None or low <= 0 <= high:
        return "no clear difference"
    return "better" if (high < 0) == lower_is_better else "worse"
