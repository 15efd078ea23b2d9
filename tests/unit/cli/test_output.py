"""A full or closed standard output is one line and an exit code of its own."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[3] / "qlora_cli"
RECIPE = "model: {path: base}\ndata: {train: {path: rows.jsonl}}\noutput: {dir: run}\n"
QLORA = f"{sys.executable} -m qlora_cli"


@pytest.mark.quick_every(3)
@pytest.mark.parametrize(
    "command",
    [
        "validate recipe.yaml > /dev/full",
        "validate recipe.yaml --json > /dev/full",
        "schema > /dev/full",
        "--version > /dev/full",
        "--help > /dev/full",
        "schema >&-",
        "schema | true",
    ],
)
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_standard_output_that_cannot_be_written(tmp_path: Path, command: str) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    (tmp_path / "rows.jsonl").touch()
    line = f"{QLORA} {command}"
    if command.endswith("| true"):  # a reader that is gone
        line = f"set -o pipefail; {{ sleep 0.2; {QLORA} schema; }} | true"
    done = subprocess.run(
        ["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 9, done.stderr
    [said] = done.stderr.splitlines()
    assert said.startswith("error: standard output")


def test_all_results_go_through_one_function() -> None:
    """Whatever else writes to standard output would fail with a traceback."""
    writers = re.compile(r"typer\.echo\((?!.*err=True)|\bprint\((?!.*file=)|sys\.stdout\.write")
    found = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if writers.search(path.read_text(encoding="utf-8"))
    }
    # The second writes code into model cards.
    assert found == {"common/standard_output.py", "runs/card_head.py"}
