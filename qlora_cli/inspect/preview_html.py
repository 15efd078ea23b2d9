"""A preview as one HTML page."""

from __future__ import annotations

from collections.abc import Sequence

from qlora_cli.common.html import page, render, template
from qlora_cli.data.sources import counted
from qlora_cli.data.sources.rows import swallowed_text
from qlora_cli.inspect.preview_model import SplitView
from qlora_cli.inspect.preview_text import visible

_STYLE = """\
pre { color: var(--quiet); }
.supervised { background: var(--marked); color: var(--marked-text); }
.special { outline: 1px solid #888; border-radius: 2px; font-weight: bold; }
.bars { width: 60%; }
.bar { background: var(--bar); height: 1em; }
.parting { color: var(--text); font-weight: bold; background: var(--warning); }
.suspect { background: var(--warning); }
"""

_BODY = template("""\
<p><span class="supervised">supervised</span>, not supervised, \
<span class="special">special token</span>, ⏎ line break</p>
{% for split in splits %}
{% set total = split.audit.total %}
<h2>{{ split.name }}: {{ counted(total.num_rows, "row") }}</h2>
<p>Lengths {{ total.shortest|comma }} to {{ total.longest|comma }} tokens, median \
{{ total.median|comma }}; {{ total.num_tokens|comma }} tokens, \
{{ total.supervised_share|percent }} supervised.</p>
<h3>Lengths</h3>
{% call wide("lengths of " ~ split.name) %}
<table class="lengths">
{% set most = split.audit.bars|map(attribute="num_rows")|max %}
{% for bar in split.audit.bars %}
<tr><td class="number">{{ bar.first|comma }} to {{ bar.last|comma }}</td>
<td class="bars"><div class="bar" style="width: {{ (bar.num_rows / most)|percent }}"></div></td>
<td class="number">{{ bar.num_rows|comma }}</td></tr>
{% endfor %}
</table>
{% endcall %}
<h3>Checks</h3>
{% call wide("checks of " ~ split.name) %}
<table>
{% for finding in split.findings %}
<tr{% if finding.is_suspect %} class="suspect"{% endif %}><td>{{ finding.what }}</td>\
<td>{{ finding.found }}\
{% for name in finding.first_named() + finding.remedy %}<br/>{{ name }}{% endfor %}</td></tr>
{% endfor %}
{% if split.has_answers %}
<tr><td>supervised turns</td><td>{{ total.num_turns|comma }}, ended by \
{% for token, count in split.stops %}{{ token }} {{ count|comma }}{{ "" if loop.last else ", " }}\
{% else %}nothing{% endfor %}</td></tr>
{% endif %}
</table>
{% endcall %}
<h3>Sources</h3>
{% call wide("sources of " ~ split.name) %}
<table>
<tr><th>source</th><th>rows</th><th>bad</th><th>dropped</th><th>cut</th><th>tokens</th>\
<th>supervised</th></tr>
{% for source in split.sources %}
<tr><td>{{ source.name }}: {{ source.path }}</td>
{% for number in (source.num_read, source.num_bad, source.num_dropped, source.num_cut,
                  source.figures.num_tokens) %}
<td class="number">{{ number|comma }}</td>
{% endfor %}
<td class="number">{{ source.figures.supervised_share|percent }}</td></tr>
{% endfor %}
</table>
{% endcall %}
{% for source in split.sources %}
<h3>{{ source.name }}: {{ source.path }}</h3>
{% if source.num_swallowed %}
<p>Left out with the bad rows: {{ swallowed_text(source.num_swallowed) }}</p>
{% endif %}
{% if source.repaired %}
<p>Rows repaired: {{ source.repaired }}</p>
{% endif %}
{% if source.ignored %}
<p>Not read in messages: {{ source.ignored }}</p>
{% endif %}
{% for sample in source.samples %}
<p>{{ sample.place }}{{ sample.description }}: \
{{ sample.num_tokens|comma }} tokens, {{ sample.num_supervised|comma }} supervised</p>
<pre>{% for span in sample.spans %}\
{% if span.is_parting %}<span class="parting" title="the answers part here">┆</span>{% endif %}\
{% set kinds = ["supervised"] * span.is_supervised + ["special"] * span.is_special %}\
{% if kinds %}<span class="{{ kinds|join(" ") }}">\
{{ visible(span.text) }}</span>{% else %}{{ visible(span.text) }}{% endif %}{% endfor %}</pre>
{% endfor %}
{% endfor %}
{% endfor %}
""")


def preview_page(splits: Sequence[SplitView], *, title: str) -> str:
    """Return the samples, figures and findings as a page."""
    body = render(
        _BODY, splits=splits, counted=counted, swallowed_text=swallowed_text, visible=visible
    )
    return page(title, body, style=_STYLE)
