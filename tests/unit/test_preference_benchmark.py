"""Check the page of benchmarks/preference.py on made-up figures."""

from __future__ import annotations

from typing import Any

from benchmarks.preference import as_conversation, as_markdown


def side(speed: float, peak: float, accuracies: list[float]) -> dict[str, Any]:
    run = {"tokens_per_second": speed, "peak_mb": peak, "above_interpreter_mb": peak - 400}
    run |= {"others_share_most": 0.5}
    pairs = [{"accuracy": value, "margin": 0.0} for value in accuracies]
    return {"about": "as it is", "runs": [run, run], "pairs": [pairs, pairs]}


def test_the_page_compares_each_side_with_the_first() -> None:
    report = {
        "model": "tiny",
        "machine": "a machine",
        "note": "nothing else ran.",
        "packages": {"trl": "1.16.0"},
        "command": "python -m benchmarks.preference",
        "sides": {
            "ours": side(3000, 600, [1, 1, 1, 0]),
            "trl": side(1000, 900, [1, 1, 0.5, 0]),
        },
    }
    page = as_markdown(report)
    assert "**Other processes took up to 50% of the CPU.**" in page
    [ours, trl] = [line for line in page.splitlines() if "as it is" in line]
    assert "| 3,000 | 1.00 | 600 | 1.00 | 200 | 75.0%, 75.0% | +25.0% |" in ours
    assert "| 1,000 | 0.33 | 900 | 1.50 | 500 | 62.5%, 62.5% | +12.5% | -12.5% (" in trl


def test_a_pair_becomes_messages() -> None:
    pair = as_conversation({"prompt": "q", "chosen": "a", "rejected": "b", "margin": 1.0})
    assert pair == {
        "prompt": [{"role": "user", "content": "q"}],
        "chosen": [{"role": "assistant", "content": "a"}],
        "rejected": [{"role": "assistant", "content": "b"}],
    }
