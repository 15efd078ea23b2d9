"""Print base, tuned and merged model of a run side by side."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from qlora_cli.runs.evaluation_table import evaluation_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="run folder with eval.json and eval-merged.json")
    run: Path = parser.parse_args().run
    report = json.loads((run / "eval.json").read_text(encoding="utf-8"))
    merged = json.loads((run / "eval-merged.json").read_text(encoding="utf-8"))
    report["models"] |= merged["models"]
    print(evaluation_table(report))


if __name__ == "__main__":
    main()
