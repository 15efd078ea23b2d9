"""Write tests/golden/templates.json anew, from the chat templates that the installed TRL ships.

The commit has to say why an outcome changed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# A script finds what lies next to it, and tests lie elsewhere.
sys.path.insert(0, str(ROOT))

from tests.golden.templates import GOLDEN, names, outcomes  # noqa: E402


def main() -> None:
    """Try every template and keep what became of it."""
    kept = {name: outcomes(name) for name in names()}
    if not kept:
        sys.exit("no templates: install the development extra, which brings trl")
    text = json.dumps(kept, indent=1, ensure_ascii=False)
    GOLDEN.write_text(text + "\n", encoding="utf-8")
    print(f"kept {len(kept)} templates; now run python scripts/gen_docs.py")


if __name__ == "__main__":
    main()
