"""Compare loss curves of the same run on a base in NF4, in 8 bit and in its own precision.

    python benchmarks/quantization_curves.py --data FOLDER_WITH_GSM8K

The folder holds train.jsonl and test.jsonl of GSM8K (`question`, `answer`). Writes
quantization_curves.json and quantization_curves.md next to this script.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
KINDS = {
    "nf4": ["quantization.type=nf4"],
    "int8": ["quantization.type=int8"],
    "none": ["quantization.type=none"],
}


def processor() -> str:
    """Return the name of the processor."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def run(kind: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Train once; return the loss curve, held-out losses, time and memory."""
    settings = [
        *KINDS[kind],
        f"data.train.path={options.data}/train.jsonl",
        f"data.evaluation.path={options.data}/test.jsonl",
        f"output.dir={folder / kind}",
        *([f"model.path={options.model}"] if options.model else []),
    ]
    overrides = [word for setting in settings for word in ("--set", setting)]
    command = [sys.executable, "-m", "qlora_cli", "train", str(HERE / "gsm8k.yaml"), *overrides]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    record = json.loads((folder / kind / "run.json").read_text(encoding="utf-8"))
    lines = (folder / kind / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    held_out = [row["eval_loss"] for row in rows if "eval_loss" in row]
    return {
        "loss": [row["loss"] for row in rows if "loss" in row],
        "held_out_before": held_out[0],
        "held_out_after": held_out[-1],
        "seconds": record["seconds"],
        "peak_memory_bytes": record["peak_memory_bytes"],
        "packages": record["packages"],
        "threads": record["threads"],
    }


def as_markdown(report: dict[str, Any]) -> str:
    """Render the page: a table of the curves, step by step."""
    runs = report["runs"]
    kinds = list(runs)
    lines = [
        "<!-- Written by benchmarks/quantization_curves.py; run that instead of editing. -->",
        "# Loss on a base in NF4, in 8 bit and unquantized",
        "",
        "SmolLM2-135M-Instruct on 256 rows of GSM8K, LoRA r=16 on all linear layers, one pass in "
        "steps of 16 rows; held-out loss on 200 rows of the test split. "
        f"{report['processor']}, {report['threads']} threads, torch {report['torch']}, "
        f"commit {report['commit']}.",
        "",
        "```bash",
        "python benchmarks/quantization_curves.py --data FOLDER_WITH_GSM8K",
        "```",
        "",
        "| step | " + " | ".join(kinds) + " |",
        "|---" * (len(kinds) + 1) + "|",
    ]

    def row(name: str, cells: list[str]) -> str:
        return f"| {name} | " + " | ".join(cells) + " |"

    each = [runs[kind] for kind in kinds]
    lines.append(row("held-out loss before", [f"{r['held_out_before']:.4f}" for r in each]))
    for step, losses in enumerate(zip(*(r["loss"] for r in each), strict=True), start=1):
        lines.append(row(str(step), [f"{loss:.4f}" for loss in losses]))
    lines.append(row("held-out loss after", [f"{r['held_out_after']:.4f}" for r in each]))
    lines.append(row("seconds", [f"{r['seconds']:,.0f}" for r in each]))
    peaks = [f"{r['peak_memory_bytes'] / 2**30:.2f} GiB" for r in each]
    lines.append(row("peak resident memory", peaks))
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run all kinds in turn and write both files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder with train.jsonl and test.jsonl")
    parser.add_argument("--model", help="another base model than the recipe's")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = {kind: run(kind, Path(folder), options) for kind in KINDS}
    git = ["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, check=True, capture_output=True, text=True).stdout.strip()
    first = next(iter(runs.values()))
    packages, threads = first["packages"], first["threads"]
    report = {
        "command": "python benchmarks/quantization_curves.py --data FOLDER_WITH_GSM8K",
        "commit": commit,
        "processor": processor(),
        "threads": threads,
        "torch": packages["torch"],
        "packages": packages,
        "runs": {
            kind: {k: v for k, v in r.items() if k not in ("packages", "threads")}
            for kind, r in runs.items()
        },
    }
    (HERE / "quantization_curves.json").write_text(
        json.dumps(report, indent=2) + "\n", encoding="utf-8"
    )
    (HERE / "quantization_curves.md").write_text(as_markdown(report), encoding="utf-8")


if __name__ == "__main__":
    main()
