"""Are the losses of two commits bit-identical? `python scripts/compare_losses.py main HEAD`

Each commit is checked out beside this one and runs its own short runs (tests/golden/runs.py).
Exit status: 0 the same, 1 different.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

PROGRAM = """
import json, sys, tempfile
from pathlib import Path
from tests.golden.runs import KINDS, losses
found = {}
for kind in KINDS:
    with tempfile.TemporaryDirectory() as folder:
        found[kind] = [loss.hex() for loss in losses(kind, Path(folder))]
print(json.dumps(found))
"""


def losses_of(commit: str, folder: Path) -> dict[str, list[str]]:
    """Exact losses of every kind, as the code of a commit computes them."""
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
    found: dict[str, list[str]] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> int:
    """Compare, and name the kinds that differ."""
    if len(sys.argv) != 3:
        print(__doc__)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        first, second = (losses_of(c, Path(folder) / f"{i}") for i, c in enumerate(sys.argv[1:]))
    differing = [kind for kind in first.keys() & second.keys() if first[kind] != second[kind]]
    for kind in sorted(first.keys() & second.keys()):
        print(f"{kind:<16} {'DIFFERS' if kind in differing else 'identical'}")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
