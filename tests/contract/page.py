"""docs/contract.md: what the checks found, as a table, and read back from it."""

from __future__ import annotations

import re
from pathlib import Path

from tests.contract.properties import PROPERTIES

PAGE = Path(__file__).parents[2] / "docs" / "contract.md"

Outcomes = dict[str, dict[str, str]]
"""Subject -> property -> the reason of the refusal; nothing, where the property holds."""

_HEAD = """\
# What each method is held to

Written by `python scripts/gen_contract.py`, which runs every check below (`tests/contract/`) on a
tiny random model for every method, on a CPU, and writes down what came of it. The tests run the
same checks, and fail where one of them comes to something else than this page says. What a method
is, is in [methods.md](methods.md).

| property | what is checked |
|---|---|
"""
_YES = "yes"


def write(outcomes: Outcomes) -> str:
    """The page."""
    reasons = list(dict.fromkeys(r for one in outcomes.values() for r in one.values() if r))
    lines = [f"| {prop.name} | {prop.says} |" for prop in PROPERTIES]
    lines += ["", "A number is a refusal: the reasons are below, as the product gives them.", ""]
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
    """What a page says."""
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
