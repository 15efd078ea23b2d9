from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest

from qlora_cli.inspect.cache_text import cache_text
from qlora_cli.runs.evaluation_table import evaluation_table
from qlora_cli.runs.merge_report import (
    BaseChoiceReport,
    ComparisonReport,
    MergeReport,
    UpdateReport,
    merge_text,
)
from qlora_cli.train.text import run_text


def estimate(value: float, low: float | None, high: float | None) -> dict[str, float | None]:
    return {"value": value, "low": low, "high": high}


def measured(loss: float, score: float) -> dict[str, Any]:
    return {
        "loss": estimate(loss, loss - 0.1, loss + 0.1),
        "json_match": estimate(score, score - 0.02, score + 0.02),
    }


REPORT: dict[str, Any] = {
    "target": "runs/x",
    "models": {"base": measured(2.5, 0.5), "tuned": measured(0.125, 0.955)},
    "differences": {"loss": estimate(-2.375, -2.5, -2.25), "json_match": estimate(0.455, 0.4, 0.5)},
    "measures": {
        "loss": {"n": 20, "is_share": False, "lower_is_better": True},
        "json_match": {"n": 1200, "is_share": True, "lower_is_better": False},
    },
    "confidence": 0.95,
}


def test_evaluation_table_has_a_column_for_each_model_and_one_for_their_difference() -> None:
    assert evaluation_table(REPORT).splitlines() == [
        "runs/x: with 95% intervals (bootstrap over the examples)",
        "            n      base                     tuned                    tuned - base",
        "loss        20     2.5000 [2.4000, 2.6000]  0.1250 [0.0250, 0.2250]  "
        "-2.3750 [-2.5000, -2.2500]  better",
        "json_match  1,200  50.0% [48.0%, 52.0%]     95.5% [93.5%, 97.5%]     "
        "+45.5% [+40.0%, +50.0%]     better",
    ]


def test_evaluation_table_of_one_model() -> None:
    models = {"base": {"loss": estimate(2.5, None, None)}}
    measures = {"loss": REPORT["measures"]["loss"]}
    report = {**REPORT, "models": models, "measures": measures, "differences": {}}
    assert evaluation_table(report).splitlines()[1:] == ["      n   base", "loss  20  2.5000"]


@pytest.mark.parametrize(
    ("low", "high", "lower_is_better", "verdict"),
    [
        (0.1, 0.3, False, "better"),
        (0.1, 0.3, True, "worse"),
        (-0.3, -0.1, False, "worse"),
        (-0.1, 0.1, True, "no clear difference"),
        (None, None, True, "no clear difference"),
    ],
)
def test_a_difference_is_reported_if_zero_is_outside_of_its_interval(
    low: float | None, high: float | None, lower_is_better: bool, verdict: str
) -> None:
    measures = {"loss": {**REPORT["measures"]["loss"], "lower_is_better": lower_is_better}}
    differences = {"loss": estimate(0.0, low, high)}
    line = evaluation_table({**REPORT, "measures": measures, "differences": differences})
    assert line.endswith(verdict)


RECORD = {
    "status": "finished",
    "steps": 8,
    "max_steps": 8,
    "steps_not_applied": 0,
    "seconds": 90.0,
    "first_loss": 3.25,
    "last_loss": 0.75,
    "tasks": ["loss"],
    "best": {"step": 6, "by": "loss", "value": 0.5},
}


def test_run_text_says_how_the_run_went_and_what_is_next() -> None:
    assert run_text("runs/x", RECORD).splitlines() == [
        "runs/x: finished after 8 steps and 90 s; training loss 3.2500 in the first step, "
        "0.7500 in the last; best loss 0.5000 at step 6; weights in last/ and best/, log "
        "in metrics.jsonl",
        "next: qlora eval runs/x",
    ]
    assert "best" not in run_text("runs/x", {**RECORD, "best": None})
    early = run_text("runs/x", {**RECORD, "steps": 7})
    assert early.startswith("runs/x: finished after 7 steps of 8 (stopped early by training")


def test_run_text_counts_steps_that_were_not_applied() -> None:
    assert "not applied" not in run_text("runs/x", RECORD)
    text = run_text("runs/x", {**RECORD, "steps_not_applied": 3})
    assert "; 3 of the steps not applied (loss or gradient not finite);" in text.splitlines()[0]


def test_run_text_does_not_send_to_eval_what_cannot_be_measured() -> None:
    record = {**RECORD, "tasks": []}
    assert run_text("runs/x", record).endswith("next: qlora merge runs/x --output runs/x/merged")


def test_run_text_quotes_the_folder_for_a_shell() -> None:
    record = {**RECORD, "tasks": []}
    command = "qlora merge 'my runs/x' --output 'my runs/x/merged'"
    assert run_text("my runs/x", record).endswith(f"next: {command}")


def test_merge_text() -> None:
    report = MergeReport(
        output="m", weights="last", base="as-trained", dtype="bfloat16", bytes=3 * 2**20,
        update=UpdateReport(
            updated=14, untrained=0, requantized=0, copied=6, norm=1.0,
            rounding_error=0.01, quantization_error=2.5,
        ),
        logit_error=0.1, kl=0.002, top1_agreement=0.975,
        comparison=ComparisonReport(
            rows=2, tokens=1020, held_out=True, held_out_rows=6, trained_loss=1.5,
            choices={
                "as-trained": BaseChoiceReport(kl=0.002, top1_agreement=1.0, loss=1.51),
                "original": BaseChoiceReport(kl=0.1, top1_agreement=0.9, loss=None),
            },
        ),
    )  # fmt: skip
    assert merge_text(report).splitlines() == [
        "m: 3.0 MiB in bfloat16, base as-trained",
        "against base plus adapter: same next token at 97.5% of positions, "
        "KL 2.0e-03 nats per token",
        "14 weights updated, 6 copied; rounding error 1.0% of the update",
        "the update is added to the quantized base that it was trained on, as it should be; "
        "that base differs from the original weights by 2.5 times the update, which is normal",
        "--base as-trained on 2 of 6 held-out rows (1,020 tokens): KL from the model as trained "
        "2.0e-03, loss 1.5100 (as trained 1.5000)",
        "--base original on 2 of 6 held-out rows (1,020 tokens): KL from the model as trained "
        "1.0e-01",
    ]
    assert "logits were not compared" in merge_text(replace(report, comparison=None))
    assert report.comparison is not None
    fixed = replace(report.comparison, held_out=False, held_out_rows=None)
    text = merge_text(replace(report, comparison=fixed))
    assert "--base original on 2 fixed texts (1,020 tokens): KL" in text
    original = merge_text(replace(report, base="original"))
    assert "differ from them by 2.5 times the update: compare the losses below" in original


def test_cache_text_says_what_is_kept_and_what_was_deleted() -> None:
    kept = {"paths": ["a.jsonl"], "num_rows": 1200, "size": 3 * 2**20, "used": time.time() - 7300}
    report: dict[str, Any] = {"cleared": False, "sets": [kept]}
    assert cache_text(report) == (
        "3.0 MiB      1,200 rows  used 2 h ago  a.jsonl\n1 prepared sets, 3.0 MiB"
    )
    assert cache_text({**report, "cleared": True}) == "deleted 1 prepared sets, 3.0 MiB"
