"""One HTML page for every report: it needs no script, no font and no network.

Pages are jinja2 templates. Values are escaped unless they are `Markup`. Filters: `comma` (1,234),
`percent` and `size` format numbers. Put each table that can be wider than a telephone into
`{% call wide("name of the table") %}...{% endcall %}`, so that it alone scrolls sideways.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from qlora_cli.common.atomic_files import replace_file
from qlora_cli.common.formatting import percent_text, size_text
from qlora_cli.errors import RecipeError

_ENVIRONMENT = Environment(
    autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
)
_ENVIRONMENT.filters |= {"comma": "{:,}".format, "percent": percent_text, "size": size_text}


def _wide(name: str, caller: Callable[[], Markup]) -> Markup:
    """Wrap a table so that it scrolls, also with the keyboard, and shows that it does."""
    start = Markup('<div class="wide" role="region" tabindex="0" aria-label="{}">').format(name)
    return start + caller() + Markup("</div>")


_ENVIRONMENT.globals["wide"] = _wide

STYLE = Markup("""\
:root { color-scheme: light dark; --text: #222; --page: #fff; --quiet: #555; --block: #f4f4f4;
  --line: #ccc; --marked: #c8efd0; --marked-text: #000; --warning: #fff0c2; --bar: #7a9cc6;
  --stripe: rgb(0 0 0 / .05); --shadow: rgb(0 0 0 / .35); }
@media (prefers-color-scheme: dark) {
  :root { --text: #ddd; --page: #181818; --quiet: #999; --block: #242424; --line: #444;
    --marked: #14532d; --marked-text: #fff; --warning: #5c4400; --bar: #4d6f99;
    --stripe: rgb(255 255 255 / .06); --shadow: rgb(255 255 255 / .4); }
}
body { font: 15px/1.5 system-ui, sans-serif; max-width: 64em; margin: 2em auto; padding: 0 1em;
  color: var(--text); background: var(--page); overflow-wrap: anywhere; }
h2 { border-bottom: 1px solid var(--line); margin-top: 2em; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--block); padding: .8em; }
/* A shadow at an edge shows that the table continues there. */
.wide { overflow-x: auto; overflow-wrap: normal; background:
  linear-gradient(to right, var(--page) 40%, transparent) left / 3em 100% no-repeat local,
  linear-gradient(to left, var(--page) 40%, transparent) right / 3em 100% no-repeat local,
  linear-gradient(to right, var(--shadow), transparent) left / 1em 100% no-repeat scroll,
  linear-gradient(to left, var(--shadow), transparent) right / 1em 100% no-repeat scroll; }
.wide td:first-child { min-width: min(8em, 40vw); max-width: min(24em, 45vw); white-space: normal;
  overflow-wrap: break-word; }
table { border-collapse: collapse; }
td, th { padding: .15em .8em .15em 0; text-align: left; vertical-align: top; }
.number { text-align: right; white-space: nowrap; }
figure { margin: 1.5em 0; }
svg { width: 100%; max-width: 45em; height: auto; font: 12px system-ui, sans-serif; }
svg text { fill: currentColor; }
svg line:not([stroke]) { stroke: currentColor; }
.grid { stroke-opacity: .15; }
@media (max-width: 30em) { body { margin: 1em auto; padding: 0 .6em; } }
@media print {
  body { max-width: none; margin: 0; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  .wide { overflow: visible; background: none; }
  .wide table { white-space: normal; overflow-wrap: anywhere; font-size: .8em; }
  figure, tr { break-inside: avoid; }
}
""")
"""The stylesheet of every page, in light and in dark, on a telephone and on paper too."""

# Should an escape ever be forgotten, the browser still runs and fetches nothing.
_PAGE = _ENVIRONMENT.from_string("""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8"/>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; \
style-src 'unsafe-inline'"/>
<meta name="viewport" content="width=device-width, initial-scale=1"/>
<title>{{ title }}</title>
<style>
{{ base_style }}{{ style }}</style>
</head>
<body>
<h1>{{ title }}</h1>
{{ body }}
</body>
</html>
""")


def template(source: str) -> Template:
    """Compile the template of a part of a page. Values that it prints are escaped."""
    return _ENVIRONMENT.from_string(source)


def render(part: Template, **values: object) -> Markup:
    """Fill a template. The result is not escaped again."""
    return Markup(part.render(**values))


def page(title: str, body: str, *, style: str = "") -> str:
    """Return a whole HTML page.

    Args:
        body: escaped unless it is `Markup`.
        style: CSS of this kind of page alone, in addition to `STYLE`. Never from data.
    """
    return _PAGE.render(title=title, body=body, base_style=STYLE, style=Markup(style))


def write_page(path: Path, text: str) -> None:
    """Write a page to where `--html` says.

    Raises:
        RecipeError: the file cannot be written.
    """
    try:
        replace_file(path.resolve(), text)
    except OSError as error:
        raise RecipeError(f"--html: {path}: {error.strerror or error}") from error
