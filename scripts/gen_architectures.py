"""Write docs/architectures.md: take a miniature of each architecture through all steps.

    python scripts/gen_architectures.py [ARCHITECTURE...]

Only the rows of these architectures are made anew; without names all are, which takes two to three
minutes. Tests compare each row with a new result.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Python finds modules next to a script, and the tests are elsewhere.
sys.path.insert(0, str(ROOT))

from qlora_cli._compat import quiet_libraries  # noqa: E402
from tests.architectures import PAGE, Outcome, architectures, examine, read, write  # noqa: E402


def main() -> None:
    """Try each architecture, and write the page."""
    quiet_libraries()
    warnings.simplefilter("ignore")
    selected = sys.argv[1:] or architectures()
    if unknown := set(selected) - set(architectures()):
        sys.exit(f"unknown architectures: {', '.join(sorted(unknown))}")
    outcomes: dict[str, Outcome] = {} if len(sys.argv) == 1 else dict(read())
    for name in selected:
        with tempfile.TemporaryDirectory() as folder:
            outcomes[name] = found = examine(name, Path(folder))
        print(f"{name}: {found.result} {found.reason}".rstrip(), flush=True)
    PAGE.write_text(write(dict(sorted(outcomes.items()))), encoding="utf-8")


if __name__ == "__main__":
    main()
