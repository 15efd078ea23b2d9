"""Write docs/fits.md: what `qlora plan --fit` proposes for several devices, and what it costs.

python scripts/plan_fits.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from qlora_cli.common.formatting import size_text
from qlora_cli.plan.text import set_line

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "fits.md"
SMALL, LARGE = "configs/llama-3.1-8b-qlora-24gb.yaml", "configs/llama-3.3-70b-qlora-48gb.yaml"
SIZES = (8, 12, 16, 24, 80)

HEAD = f"""\
<!-- Written by scripts/plan_fits.py; run that instead of editing. -->
# What fits on which device

The table shows what `qlora plan {SMALL} --device SIZE --fit` proposes. All rows have
`data.max_length` tokens.

| device | changes | tensors | process | fits |
|---|---|---|---|---|"""

COST = """
## What a plan costs

Each command runs in its own process, and the start of Python and torch is included. Seconds and
memory depend on the machine. `--fit` traces each recipe that it tries.

| command | seconds | resident MiB |
|---|---|---|"""


def run(*arguments: str) -> tuple[dict[str, Any], float, int]:
    """Run a plan; return its report, its seconds and its largest resident set in bytes."""
    started = time.monotonic()
    command = [sys.executable, "-m", "qlora_cli", "plan", *arguments, "--json"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        said = process.stdout.read()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return json.loads(said), time.monotonic() - started, 1024 * used.ru_maxrss


def main() -> None:
    """Plan all of them."""
    lines, costs = [HEAD], [COST]
    commands = [(SMALL, "--device", f"{size}GiB", "--fit") for size in SIZES]
    commands += [(path, "--device", "80GiB") for path in (SMALL, LARGE)]
    for command in commands:
        report, seconds, resident = run(*command)
        costs.append(f"| `{' '.join(command)}` | {seconds:.0f} | {resident / 2**20:,.0f} |")
        if "--fit" not in command:
            continue
        changes, process = report["changes"], report["process"]
        what = "nothing suffices; this is the smallest plan tried" if changes is None else "none"
        cells = [
            command[2], f"`{set_line(changes)}`" if changes else what,
            size_text(report["peak"]["bytes"]),
            f"{size_text(process['low'])} to {size_text(process['high'])}",
            report["fits"]["verdict"],
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    PAGE.write_text("\n".join([*lines, *costs]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
