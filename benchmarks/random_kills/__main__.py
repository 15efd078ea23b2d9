"""The command line."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import benchmarks.random_kills
from benchmarks.random_kills.examine import examine, is_same
from benchmarks.random_kills.forms import MODEL, gsm8k_form, tiny_form
from benchmarks.random_kills.page import as_markdown

RESULTS = Path(__file__).resolve().parents[1] / "random_kills.json"


def main() -> int:
    """Run one form and write its results. Return 0 if the killed run has the same results."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.random_kills",
        description=benchmarks.random_kills.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("form", choices=["tiny", "gsm8k"])
    parser.add_argument("--data", type=Path, help="folder with train.jsonl and test.jsonl of GSM8K")
    parser.add_argument("--model", type=Path, default=MODEL, help="default: the demo model")
    parser.add_argument("--kills", type=int, help="50 for tiny, 20 for gsm8k")
    parser.add_argument("--steps", type=int, help="60 for tiny, 30 for gsm8k; not below the kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="work in this folder and keep it")
    parser.add_argument("--note", default="nothing else ran.", help="other load on the machine")
    options = parser.parse_args()
    if (options.form == "gsm8k") != (options.data is not None):
        parser.error("gsm8k needs --data; tiny does not take it")
    kills, steps = {"tiny": (50, 60), "gsm8k": (20, 30)}[options.form]
    kills, steps = options.kills or kills, options.steps or steps
    if steps < kills:
        parser.error(f"--steps {steps} is less than --kills {kills}")
    with tempfile.TemporaryDirectory() as made:
        folder = options.folder or Path(made)
        folder.mkdir(parents=True, exist_ok=True)
        if options.form == "tiny":
            form = tiny_form(folder, kills, steps)
        else:
            form = gsm8k_form(folder, kills, steps, options.data, options.model)
        report = examine(form, folder, options.seed, with_saves=options.form == "gsm8k")
    report["note"] = options.note
    reports = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {}
    reports = dict(sorted({**reports, options.form: report}.items(), reverse=True))
    RESULTS.write_text(json.dumps(reports, indent=1) + "\n", encoding="utf-8")
    RESULTS.with_suffix(".md").write_text(as_markdown(reports), encoding="utf-8")
    print("the same" if is_same(report) else f"NOT THE SAME: {report['different']}")
    return 0 if is_same(report) else 1


if __name__ == "__main__":
    sys.exit(main())
