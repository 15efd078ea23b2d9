"""Find the quotation mark in a CSV file that swallows the lines after it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def swallowed_lines(lines: Sequence[str], delimiter: str, first: int) -> str:
    """Name the quotation mark that makes a record span several lines; empty if it spans one.

    Args:
        lines: the lines of the record.
        first: the number of the first of them in the file.
    """
    if len(lines) < 2:
        return ""
    text = "".join(lines)
    spans = [
        (text.count("\n", start, end), text.count("\n", 0, start))
        for start, end in _quoted_fields(text, delimiter)
    ]
    number, index = max(spans, key=lambda span: span[0], default=(0, 0))
    if not number:
        return ""
    # A field that is not closed ends with the line break of the last line.
    number = min(number, len(lines) - 1 - index)
    swallowed = "the next line" if number == 1 else f"the next {number:,} lines"
    opening = first + index
    return (
        f"; a quotation mark opens a field in line {opening} and swallows {swallowed}, up to line "
        f"{opening + number}"
    )


def _quoted_fields(text: str, delimiter: str) -> Iterator[tuple[int, int]]:
    """Yield start and end of each quoted field, up to the first that is closed in the wrong place.

    They are found as the csv module finds them: a quotation mark opens a field only as its first
    character, and two of them inside stand for one.
    """
    at = 0
    while at < len(text):
        if text[at] == '"':
            end = _closing_mark(text, at + 1) + 1
            yield at, end
            if text[end : end + 1] not in (delimiter, "\r", "\n"):
                return
            at = end + 1
            continue
        ends = [found for mark in (delimiter, "\n") if (found := text.find(mark, at)) >= 0]
        if not ends:
            return
        at = min(ends) + 1


def _closing_mark(text: str, at: int) -> int:
    """Return the place of the quotation mark that closes a field, or of the text's end."""
    while (found := text.find('"', at)) >= 0:
        if text[found + 1 : found + 2] != '"':
            return found
        at = found + 2
    return len(text)
