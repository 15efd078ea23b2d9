"""Write docs/contract.md: run the contract's checks for training methods.

    python scripts/gen_contract.py [METHOD...]

A METHOD is the name of a row, such as "lora, one layer", or an `adapter.type`, which selects all
of its rows. Only these rows are made anew. Without names all are, which takes a few minutes. There
is no --check: `tests/contract/` runs the same checks one by one and compares them with the page.
"""

from __future__ import annotations

import sys
import tempfile
import traceback
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Python finds modules next to a script, and the tests are elsewhere.
sys.path.insert(0, str(ROOT))

from qlora_cli._compat import quiet_libraries  # noqa: E402
from tests.contract.page import PAGE, Outcomes, read, write  # noqa: E402
from tests.contract.properties import PROPERTIES, Case  # noqa: E402
from tests.contract.subjects import SUBJECTS, select  # noqa: E402


def main() -> None:
    """Run the checks, and write the page unless one fails: then name all that failed."""
    quiet_libraries()
    warnings.simplefilter("ignore")
    try:
        selected = select(sys.argv[1:])
    except KeyError as error:
        sys.exit(error.args[0])
    kept = read(PAGE.read_text(encoding="utf-8")) if len(selected) < len(SUBJECTS) else {}
    if missing := [name for name in SUBJECTS if name not in (*kept, *selected)]:
        sys.exit(f"the page has no row for {', '.join(missing)}: name them too")
    outcomes: Outcomes = {}
    failed: list[str] = []
    with tempfile.TemporaryDirectory() as bases:
        for name, subject in SUBJECTS.items():
            if name not in selected:
                outcomes[name] = kept[name]
                continue
            outcomes[name] = {}
            for prop in PROPERTIES:
                with tempfile.TemporaryDirectory() as folder:
                    case = Case(subject, Path(bases), Path(folder))
                    try:
                        outcomes[name][prop.name] = prop.check(case)
                    # A check asserts, and what it tries may raise any kind of error.
                    except Exception as error:
                        traceback.print_exc()
                        failed.append(f"{name}, {prop.name}: {type(error).__name__}: {error}")
            refused = [prop for prop, reason in outcomes[name].items() if reason]
            print(f"{name}: {', '.join(refused) or 'nothing'} refused", flush=True)
    if failed:
        sys.exit("\n".join(["the page is not written, since these failed:", *failed]))
    PAGE.write_text(write(outcomes), encoding="utf-8")


if __name__ == "__main__":
    main()
