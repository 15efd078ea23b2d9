from __future__ import annotations

import time
from typing import Any

from qlora_cli.report_text import cache_text, evaluation_table, merge_text, run_text


def measured(loss: float, score: float) -> dict[str, Any]:
    tasks = {"json_match": {"score": score, "rows": 20}}
    return {"loss": loss, "perplexity": 2 * loss, "tasks": tasks}


def test_evaluation_table_has_a_column_for_each_model() -> None:
    models = {"base": measured(2.5, 0.0), "tuned": measured(0.125, 0.955)}
    report = {"target": "runs/x", "rows": 20, "supervised_tokens": 700, "models": models}
    assert evaluation_table(report).splitlines() == [
        "runs/x: 20 rows, 700 supervised tokens",
        "                  base       tuned",
        "loss            2.5000      0.1250",
        "perplexity       5.000       0.250",
        "json_match        0.0%       95.5%",
    ]


def test_run_text_names_the_best_step_if_there_is_one() -> None:
    record = {"status": "finished", "max_steps": 8, "best": {"step": 6, "eval_loss": 0.5}}
    assert run_text("runs/x", record).splitlines() == [
        "runs/x: finished after 8 steps",
        "lowest evaluation loss: 0.5000 at step 6",
        "next: qlora eval runs/x",
    ]
    assert "lowest" not in run_text("runs/x", {**record, "best": None})


def test_merge_text() -> None:
    report = {"output": "m", "bytes": 3 * 2**20, "dtype": "bfloat16", "kl": 0.002}
    lines = merge_text({**report, "top1_agreement": 0.975}).splitlines()
    assert lines[0] == "m: 3 MiB in bfloat16"
    assert "97.5%" in lines[1]
    assert "2.0e-03" in lines[1]


def test_cache_text_says_what_is_kept_and_what_was_deleted() -> None:
    kept = {"paths": ["a.jsonl"], "num_rows": 1200, "size": 3 * 2**20, "used": time.time() - 7300}
    report: dict[str, Any] = {"cleared": False, "sets": [kept]}
    assert cache_text(report) == (
        "3.0 MiB      1,200 rows  used 2 h ago  a.jsonl\n1 prepared sets, 3.0 MiB"
    )
    assert cache_text({**report, "cleared": True}) == "deleted 1 prepared sets, 3.0 MiB"
