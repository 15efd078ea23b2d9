"""A preview as one HTML page that needs nothing else: no script, no font, no network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from qlora_cli.data.prepared.statistics import LengthBar
from qlora_cli.data.sources import counted
from qlora_cli.inspect.preview_model import Piece, Sample, SideView, SourceView
from qlora_cli.inspect.preview_text import visible

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 64em; margin: 2em auto; padding: 0 1em;
  color: #222; background: #fff; }
h2 { border-bottom: 1px solid #ccc; margin-top: 2em; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f6f6; padding: .8em;
  color: #555; }
.learnt { background: #c8efd0; color: #000; }
.special { outline: 1px solid #888; border-radius: 2px; font-weight: bold; }
table { border-collapse: collapse; }
td, th { padding: .15em .8em .15em 0; text-align: left; vertical-align: top; }
.number { text-align: right; }
.bar { background: #7a9cc6; height: 1em; }
.suspect { background: #fff0c2; }
@media (prefers-color-scheme: dark) {
  body { color: #ddd; background: #181818; }
  pre { background: #242424; color: #999; }
  .learnt { background: #14532d; color: #fff; }
  .suspect { background: #5c4400; }
}
"""


def preview_page(sides: Sequence[SideView], *, title: str) -> str:
    """Samples, figures and findings. Whatever comes from the data is escaped."""
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">',
            # Should an escape be forgotten one day, the browser still runs and fetches nothing.
            '<meta http-equiv="Content-Security-Policy" '
            "content=\"default-src 'none'; style-src 'unsafe-inline'\">",
            '<meta name="viewport" content="width=device-width">',
            f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>",
            f"<h1>{escape(title)}</h1>",
            '<p><span class="learnt">learnt</span>, not learnt, '
            '<span class="special">special token</span>, ⏎ line break</p>',
            *(line for side in sides for line in _side(side)),
            "</html>\n",
        ]
    )


def _side(side: SideView) -> Iterator[str]:
    total = side.audit.total
    yield f"<h2>{escape(side.name)}: {counted(total.num_rows, 'row')}</h2>"
    yield (
        f"<p>Lengths {total.shortest:,} to {total.longest:,} tokens, median {total.median:,}; "
        f"{total.num_tokens:,} tokens, {total.supervised_share:.1%} learnt.</p>"
    )
    yield from _histogram(side.audit.bars)
    yield "<h3>Looked at</h3>\n<table>"
    for finding in side.findings:
        mark = ' class="suspect"' if finding.count else ""
        found = "<br>".join(map(escape, (finding.found, *finding.named)))
        yield f"<tr{mark}><td>{escape(finding.what)}<td>{found}"
    stops = ", ".join(f"{token} {count:,}" for token, count in side.stops)
    yield f"<tr><td>learnt turns<td>{total.num_turns:,}, ended by {escape(stops or 'nothing')}"
    yield "</table>"
    yield "<h3>Sources</h3>\n<table>"
    yield "<tr><th>source<th>rows<th>bad<th>dropped<th>cut<th>tokens<th>learnt"
    for source in side.sources:
        figures = source.figures
        counts = (source.num_read, source.num_bad, source.num_dropped, source.num_cut)
        cells = [
            *(f"{n:,}" for n in (*counts, figures.num_tokens)),
            f"{figures.supervised_share:.1%}",
        ]
        numbers = "".join(f'<td class="number">{cell}' for cell in cells)
        yield f"<tr><td>{escape(source.name)}: {escape(source.path)}{numbers}"
    yield "</table>"
    for source in side.sources:
        yield from _samples(source)


def _samples(source: SourceView) -> Iterator[str]:
    yield f"<h3>{escape(source.name)}: {escape(source.path)}</h3>"
    if source.ignored:
        yield f"<p>Not read in messages: {escape(source.ignored)}</p>"
    for sample in source.samples:
        answer = f", {sample.answer}" if sample.answer else ""
        yield (
            f"<p>{escape(sample.place)}{answer}: {sample.num_tokens:,} tokens, "
            f"{sample.num_supervised:,} learnt</p>"
        )
        yield f"<pre>{_draw(sample)}</pre>"


def _draw(sample: Sample) -> str:
    return "".join(map(_piece, sample.pieces))


def _piece(piece: Piece) -> str:
    classes = " ".join(["learnt"] * piece.is_learnt + ["special"] * piece.is_special)
    text = escape(visible(piece.text))
    return f'<span class="{classes}">{text}</span>' if classes else text


def _histogram(bars: Sequence[LengthBar]) -> Iterator[str]:
    most = max(bar.num_rows for bar in bars)
    yield "<h3>Lengths</h3>\n<table>"
    for bar in bars:
        yield (
            f'<tr><td class="number">{bar.first:,} to {bar.last:,}'
            f'<td style="width: 30em"><div class="bar" style="width: {bar.num_rows / most:.1%}">'
            f'</div><td class="number">{bar.num_rows:,}'
        )
    yield "</table>"
