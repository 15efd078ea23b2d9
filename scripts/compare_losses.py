"""Check that two commits train alike: `python scripts/compare_losses.py main HEAD`.

Each commit is checked out next to this one and runs its own short runs (tests/golden/runs.py).
Losses and saved weights must be the same, bit for bit. Exit status: 0 the same, 1 different.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

PROGRAM = """
import hashlib, json, sys, tempfile
from pathlib import Path
from tests.golden.runs import KINDS, losses
found = {}
for kind in KINDS:
    with tempfile.TemporaryDirectory() as folder:
        steps = [loss.hex() for loss in losses(kind, Path(folder))]
        files = sorted((Path(folder) / "run" / "last").glob("*.safetensors"))
        assert files
        weights = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
        found[kind] = {"losses": steps, "weights": weights}
print(json.dumps(found))
"""


def train_all(commit: str, folder: Path) -> dict[str, Any]:
    """Train every kind of run with the code of a commit: its losses and digests of its weights."""
    git = ["git", "-C", str(ROOT), "worktree"]
    subprocess.run([*git, "add", "--detach", "--quiet", str(folder), commit], check=True)
    try:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(folder)},
            stdout=subprocess.PIPE,
            check=True,
        )
    finally:
        subprocess.run([*git, "remove", "--force", str(folder)], check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> int:
    """Compare, and name the kinds that differ."""
    if len(sys.argv) != 3:
        print(__doc__)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        first, second = (train_all(c, Path(folder) / f"{i}") for i, c in enumerate(sys.argv[1:]))
    is_same = True
    for kind in sorted(first.keys() & second.keys()):
        differing = [part for part in first[kind] if first[kind][part] != second[kind][part]]
        is_same &= not differing
        print(f"{kind:<16} {'DIFFERS: ' + ', '.join(differing) if differing else 'identical'}")
    return 0 if is_same else 1


if __name__ == "__main__":
    sys.exit(main())
