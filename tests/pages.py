"""Fenced blocks of the Markdown pages, and comparison of quoted output with real output."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]

_BLOCK = re.compile(
    r"^(?:<!-- quoted: (?P<quoted>[^\n]+) -->\n)?(?P<indent> *)```(?P<language>\w+)\n"
    r"(?P<text>.*?)^(?P=indent)```",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        quoted: name of the output that it quotes, from the comment `<!-- quoted: NAME -->` on the
            line before the block; empty if it quotes none.
    """

    page: Path
    line: int
    language: str
    text: str
    quoted: str = ""

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> Iterator[Block]:
    """Yield the fenced blocks of a page that name a language."""
    text = page.read_text(encoding="utf-8")
    for match in _BLOCK.finditer(text):
        line = text[: match.start("language")].count("\n") + 1
        yield Block(page, line, match["language"], match["text"], match["quoted"] or "")


BLOCKS = [block for page in PAGES for block in blocks(page)]


def check_quote(quoted: str, printed: str) -> None:
    """Assert that a quoted text shows what was printed.

    A quoted line `...` stands for any number of lines, and `...` within a line for any text.
    White space at the ends of lines is ignored.
    """
    pattern = ""
    for line in quoted.rstrip("\n").splitlines():
        if line.strip() == "...":
            pattern += r"(?:.*\n)*"
        else:
            parts = (re.escape(part) for part in line.rstrip().split("..."))
            pattern += ".*".join(parts) + r"\n"
    text = "".join(f"{line.rstrip()}\n" for line in printed.splitlines())
    assert re.fullmatch(pattern, text), f"quoted:\n{quoted}\nprinted:\n{text}"


def mask_numbers(text: str) -> str:
    """Replace what differs between models: numbers, dtypes, column widths, verdicts."""
    text = re.sub(r"\bb?float(16|32)\b", "DTYPE", text)
    text = re.sub(r"[+-]?\d[\d,.]*(?:e[+-]?\d+)?", "0", text)
    text = re.sub(r"\b(better|worse|no clear difference)\b", "VERDICT", text)
    return re.sub(r"(?<=\S) {2,}", "  ", text)
