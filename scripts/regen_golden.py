"""Write tests/golden/losses.json anew. The commit has to say why the losses changed."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# A script can import only from its own folder; the tests are elsewhere.
sys.path.insert(0, str(ROOT))

from tests.golden.runs import KEPT, KINDS, losses  # noqa: E402


def main() -> None:
    """Run every kind and keep its losses."""
    kept = {}
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as folder:
            kept[kind] = losses(kind, Path(folder))
        print(kind, " ".join(f"{loss:.6f}" for loss in kept[kind]))
    KEPT.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
