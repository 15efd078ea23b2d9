"""Refuse files that should not be committed: large ones, leftovers of a merge, careless text.

Sentences that have to be translated by their reader are refused too, in code and pages.

Give it file names, as pre-commit does; without any it looks at all that git knows.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

MAX_BYTES = 500_000
# In brackets, so that this file does not find itself.
MISSPELT = "te[h]|reciev[e]|seperat[e]|occure[d]|until[l]|paramte[r]|wic[h]|lengh[t]|adres[s]"
SLIPS = {
    r"^(<{7} |={7}$|>{7} )": "leftover of a merge",
    r"[ \t]+$": "white space at the end of the line",
    r"\b([A-Za-z]{3,}) \1\b(?!\S)": "the same word twice",
    rf"(?i)\b({MISSPELT})\b": "misspelt",
}
REPEATED_ON_PURPOSE = {"that", "had"}
# Each of these reads well in the language it comes from. In brackets, as above.
STIFF = {
    r'^\s*r?"""(Wha[t]|Whethe[r]|O[f]|Wher[e]|A[s])\b': "begin with an imperative or a noun",
    r"(?<![Tt]here )\b(is|are|was|were) n[o] (?!long|more|less|few|later)[a-z]+": "write 'not a'",
    r"\bas fa[r] as\b": "say it directly",
    r"\b(,|and|but) of whic[h]\b": "make it a sentence of its own",
    r"\bbesid[e] (it|them|that|this)\b": "write 'next to' or 'in addition to'",
    r"\blearn[t]\b": "write 'trained on', 'supervised' or 'learned'",
    r"\b(go|goes|went) o[n]\b": "write 'continue' or 'resume'",
    r"\bso man[y] (?!as\b)(steps|times|rows|tokens)\b": "write 'N'",
}
HISTORY = {"CHANGELOG.md", "dev/LOG.md"}
"""Written as it happened, and not rewritten."""


def problems(path: Path) -> Iterator[str]:
    size = path.stat().st_size
    if size > MAX_BYTES:
        yield f"{path}: {size:,} bytes; at most {MAX_BYTES:,}"
        return
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return
    if text and not text.endswith("\n"):
        yield f"{path}: no newline at the end"
    is_prose = path.suffix in (".py", ".md", ".sh", ".yaml") and path.as_posix() not in HISTORY
    patterns = {**SLIPS, **STIFF} if is_prose else SLIPS
    for number, line in enumerate(text.splitlines(), start=1):
        yield from (f"{path}:{number}: {reason}" for reason in slips(line, patterns))


def slips(line: str, patterns: Mapping[str, str]) -> Iterator[str]:
    for pattern, reason in patterns.items():
        found = re.search(pattern, line)
        if found and (found.lastindex is None or found[1].lower() not in REPEATED_ON_PURPOSE):
            yield f"{reason}: {found[0]!r}"


def main() -> None:
    listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=True)
    names = sys.argv[1:] or listed.stdout.splitlines()
    found = [problem for name in names if Path(name).is_file() for problem in problems(Path(name))]
    print(*found, sep="\n", end="\n" if found else "")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
