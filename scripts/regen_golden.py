"""Regenerate tests/golden/losses.json: `python scripts/regen_golden.py [KIND...]` (default: all).

The commit has to say why the losses changed.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# A script finds only the modules of its own folder.
sys.path.insert(0, str(ROOT))

from tests.golden.runs import KEPT, KEPT_KINDS, losses  # noqa: E402


def main() -> None:
    """Run the kinds and keep their losses."""
    kept = json.loads(KEPT.read_text(encoding="utf-8"))
    for kind in sys.argv[1:] or KEPT_KINDS:
        with tempfile.TemporaryDirectory() as folder:
            kept[kind] = losses(kind, Path(folder))
        print(kind, " ".join(f"{loss:.6f}" for loss in kept[kind]))
    kept = {kind: kept[kind] for kind in KEPT_KINDS}
    KEPT.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
