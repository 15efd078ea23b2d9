"""A preview as text, for a terminal or a file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from qlora_cli.data.prepared.statistics import LengthBar
from qlora_cli.data.sources import counted
from qlora_cli.data.sources.rows import swallowed_text
from qlora_cli.inspect.preview_model import Sample, SourceView, SplitView

_OPEN, _CLOSE, _SPECIAL, _BREAK, _PARTING = "⟦", "⟧", "◆", "⏎", "┆"
_MARKS = _OPEN + _CLOSE + _SPECIAL + _BREAK + _PARTING
_BAR_WIDTH = 40

_SUPERVISED, _MASKED, _BOLD, _WARN, _OFF = "\x1b[32m", "\x1b[2m", "\x1b[1m", "\x1b[33m", "\x1b[0m"
_SUPERVISED_SPECIAL, _MASKED_SPECIAL = "\x1b[1;7;32m", "\x1b[2;7m"


def preview_text(splits: Sequence[SplitView], *, colour: bool) -> str:
    """Format samples, statistics and findings.

    Args:
        colour: show supervised tokens in colour instead of with marks.
    """
    samples = [sample for split in splits for one in split.sources for sample in one.samples]
    lines = [_legend(colour)]
    if any(span.is_parting for sample in samples for span in sample.spans):
        lines[0] += f"   {_PARTING} the two answers of a pair part here"
    for split in splits:
        for source in split.sources:
            lines += ["", *_source(source, colour)]
        lines += ["", *_split(split, colour)]
    return "\n".join(lines)


def _legend(colour: bool) -> str:
    if colour:
        return (
            f"{_SUPERVISED}supervised{_OFF}  {_MASKED}not supervised{_OFF}  "
            f"{_SUPERVISED_SPECIAL}special token, supervised{_OFF}  "
            f"{_MASKED_SPECIAL}special token, not supervised{_OFF}  {_BREAK} line break"
        )
    return (
        f"{_OPEN}supervised{_CLOSE} not supervised   {_SPECIAL} before a special token   "
        f"{_BREAK} line break"
    )


def _source(source: SourceView, colour: bool) -> Iterator[str]:
    yield _heading(f"{source.name}: {source.path}", colour)
    yield (
        f"{counted(source.num_read, 'row')}, {source.num_bad:,} bad, "
        f"{source.num_dropped:,} dropped, {source.num_cut:,} cut; "
        f"{source.figures.num_tokens:,} tokens, {source.figures.supervised_share:.1%} supervised"
    )
    if source.num_swallowed:
        yield f"left out with the bad rows: {swallowed_text(source.num_swallowed)}"
    if source.repaired:
        yield f"rows repaired: {source.repaired}"
    if source.ignored:
        yield f"not read in messages: {source.ignored}"
    for sample in source.samples:
        yield ""
        yield _heading(_title(sample), colour)
        yield from (f"  {line}" for line in _draw(sample, colour).splitlines())


def _title(sample: Sample) -> str:
    counts = f"{sample.num_tokens:,} tokens, {sample.num_supervised:,} supervised"
    return f"{sample.place}{sample.description}: {counts}"


def _draw(sample: Sample, colour: bool) -> str:
    """Format the spans of a sample. A mark stands before each line break."""
    drawn, was_supervised = "", False
    for span in sample.spans:
        text = visible(span.text, _BREAK + _PARTING if colour else _MARKS)
        if colour:
            drawn += f"{_WARN}{_PARTING}{_OFF}" if span.is_parting else ""
            style = _STYLES[span.is_supervised, span.is_special]
            # End the style with each line, because pagers forget it there.
            drawn += "\n".join(f"{style}{line}{_OFF}" if line else "" for line in text.split("\n"))
            continue
        if span.is_supervised != was_supervised:
            drawn += _OPEN if span.is_supervised else _CLOSE
        drawn += _PARTING if span.is_parting else ""
        drawn += f"{_SPECIAL}{text}" if span.is_special else text
        was_supervised = span.is_supervised
    return drawn + (_CLOSE if was_supervised else "")


_STYLES = {
    (True, True): _SUPERVISED_SPECIAL,
    (True, False): _SUPERVISED,
    (False, True): _MASKED_SPECIAL,
    (False, False): _MASKED,
}


def visible(text: str, marks: str = _BREAK) -> str:
    """Escape characters that are invisible or control a terminal.

    Args:
        marks: characters with a meaning in the preview, which are escaped too.
    """
    return "".join(map(_visible, text, [marks] * len(text)))


def _visible(character: str, marks: str) -> str:
    if character == "\n":
        return f"{_BREAK}\n"
    if character in marks or not character.isprintable():
        return character.encode("unicode_escape").decode()
    return character


def _split(split: SplitView, colour: bool) -> Iterator[str]:
    total = split.audit.total
    yield _heading(f"{split.name}: {counted(total.num_rows, 'row')}", colour)
    yield (
        f"lengths {total.shortest:,} to {total.longest:,} tokens, median {total.median:,}; "
        f"{total.num_tokens:,} tokens, {total.supervised_share:.1%} supervised"
    )
    yield from _histogram(split.audit.bars)
    stops = ", ".join(f"{token} {count:,}" for token, count in split.stops)
    if split.has_answers:
        yield f"supervised turns: {total.num_turns:,}, ended by {stops or 'nothing'}"
    width = max(len(finding.what) for finding in split.findings)
    for finding in split.findings:
        line = f"{finding.what:<{width}}  {finding.found}"
        yield f"{_WARN}{line}{_OFF}" if colour and finding.is_suspect else line
        yield from (f"  {name}" for name in (*finding.first_named(), *finding.remedy))


def _histogram(bars: Sequence[LengthBar]) -> Iterator[str]:
    names = [f"{bar.first:,} to {bar.last:,}" for bar in bars]
    most = max(bar.num_rows for bar in bars)
    for bar, name in zip(bars, names, strict=True):
        # Round up, so that every bar with a row is visible.
        width = -(-bar.num_rows * _BAR_WIDTH // most)
        yield f"  {name:>{max(map(len, names))}}  {'█' * width} {bar.num_rows:,}".rstrip()


def _heading(text: str, colour: bool) -> str:
    return f"{_BOLD}{text}{_OFF}" if colour else text
