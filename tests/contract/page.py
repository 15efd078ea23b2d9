"""Write the results of the checks as a table, docs/contract.md, and read them back."""

from __future__ import annotations

import re
from pathlib import Path

from tests.contract.properties import PROPERTIES

PAGE = Path(__file__).parents[2] / "docs" / "contract.md"

Outcomes = dict[str, dict[str, str]]
"""Subject -> property -> reason of the refusal, or an empty string if the property holds."""

_HEAD = """\
# The contract of training methods

`python scripts/gen_contract.py` writes this page: it runs every check below (`tests/contract/`) for
every [training method](methods.md), on a tiny random model on a CPU. The tests run the same checks,
and fail if a result differs from this page.

| property | check |
|---|---|
"""
_YES = "yes"


def write(outcomes: Outcomes) -> str:
    """Return the page."""
    reasons = list(dict.fromkeys(r for one in outcomes.values() for r in one.values() if r))
    lines = [f"| {prop.name} | {prop.description} |" for prop in PROPERTIES]
    lines += [
        "",
        "`no` with a number is a refusal: the reasons, as `qlora` reports them, are at the end.",
        "",
    ]
    lines += ["| method | " + " | ".join(prop.name for prop in PROPERTIES) + " |"]
    lines += ["|---" * (len(PROPERTIES) + 1) + "|"]
    for name, found in outcomes.items():
        cells = [
            f"no ({reasons.index(found[prop.name]) + 1})" if found[prop.name] else _YES
            for prop in PROPERTIES
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", *(f"{number}. {reason}" for number, reason in enumerate(reasons, start=1))]
    return _HEAD + "\n".join(lines).rstrip() + "\n"


def read(text: str) -> Outcomes:
    """Return the results that a page lists."""
    reasons = dict(re.findall(r"^(\d+)\. (.+)$", text, re.MULTILINE))
    table = text.partition("| method |")[2].splitlines()
    names = [cell.strip() for cell in table[0].strip(" |").split("|")]
    outcomes: Outcomes = {}
    for line in table[2:]:
        if not line.startswith("|"):
            break
        subject, *cells = [cell.strip() for cell in line.strip(" |").split("|")]
        numbers = [cell.removeprefix("no (").removesuffix(")") for cell in cells]
        found = ["" if cell == _YES else reasons[cell] for cell in numbers]
        outcomes[subject] = dict(zip(names, found, strict=True))
    return outcomes
