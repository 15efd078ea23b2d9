"""Looking at a recipe must not cost the seconds that torch takes to load."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, sys
from qlora_cli.cli import main
try:
    main(sys.argv[1:])
except SystemExit as exit:
    print(json.dumps([exit.code, sorted(sys.modules)]))
"""

HEAVY = {"torch", "transformers", "peft", "bitsandbytes", "datasets", "accelerate", "numpy", "rich"}


@pytest.mark.parametrize(
    "arguments",
    [
        ("validate", "recipe.yaml"),
        ("validate", "none.yaml"),
        ("schema",),
        ("--help",),
        ("train", "-h"),
    ],
    ids=str,
)
def test_nothing_heavy_is_loaded(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    (tmp_path / "recipe.yaml").write_text(
        "model: {path: base}\ndata: {train: {path: rows.jsonl}}\noutput: {dir: run}\n",
        encoding="utf-8",
    )
    command = [sys.executable, "-c", SCRIPT, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    code, modules = json.loads(done.stdout.splitlines()[-1])
    assert code == (2 if "none.yaml" in arguments else 0)
    assert "qlora_cli" in modules
    assert not HEAVY & {name.partition(".")[0] for name in modules}
    # The recipe's classes take two thirds of the time of `qlora --help`.
    assert ("qlora_cli.recipe.load" in modules) == (arguments[0] == "validate")
