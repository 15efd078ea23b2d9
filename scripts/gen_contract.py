"""Write docs/contract.md: run every check of the contract for every method.

    python scripts/gen_contract.py

It takes a few minutes, so there is no --check: `tests/contract/` runs the same checks, one by one,
against what the page says.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# A script finds what lies beside it, and tests lie elsewhere.
sys.path.insert(0, str(ROOT))

from qlora_cli._compat import quiet_libraries  # noqa: E402
from tests.contract.page import PAGE, Outcomes, write  # noqa: E402
from tests.contract.properties import PROPERTIES, Case  # noqa: E402
from tests.contract.subjects import SUBJECTS  # noqa: E402


def main() -> None:
    """Run them all. What neither holds nor is refused ends it, and no page is written."""
    quiet_libraries()
    warnings.simplefilter("ignore")
    outcomes: Outcomes = {}
    with tempfile.TemporaryDirectory() as bases:
        for name, subject in SUBJECTS.items():
            outcomes[name] = {}
            for prop in PROPERTIES:
                with tempfile.TemporaryDirectory() as folder:
                    case = Case(subject, Path(bases), Path(folder))
                    outcomes[name][prop.name] = prop.check(case)
            refused = [prop for prop, reason in outcomes[name].items() if reason]
            print(f"{name}: {', '.join(refused) or 'nothing'} refused", flush=True)
    PAGE.write_text(write(outcomes), encoding="utf-8")


if __name__ == "__main__":
    main()
