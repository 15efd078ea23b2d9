"""Regenerate tests/golden/templates.json from the chat templates in the installed TRL.

The commit message has to say why an outcome changed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# A script can import only from its own folder, and the tests are elsewhere.
sys.path.insert(0, str(ROOT))

from tests.golden.templates import GOLDEN, names, outcomes  # noqa: E402


def main() -> None:
    """Test every template and store the outcome."""
    kept = {name: outcomes(name) for name in names()}
    if not kept:
        sys.exit("no templates: install the development extra, which brings trl")
    text = json.dumps(kept, indent=1, ensure_ascii=False)
    GOLDEN.write_text(text + "\n", encoding="utf-8")
    print(f"kept {len(kept)} templates; now run python scripts/gen_docs.py")


if __name__ == "__main__":
    main()
