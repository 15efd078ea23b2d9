"""Propose a template over the columns of a user's table, ready to be copied into a recipe."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from types import MappingProxyType

from qlora_cli.data.formats.template import reads_column

_NONE: Mapping[str, str] = MappingProxyType({})


def propose_template(
    request: str,
    answer: str,
    *,
    section: str = "data.train",
    filters: str = "",
    fields: Mapping[str, str] = _NONE,
) -> str:
    """Return the recipe keys that read two columns of a source with a template.

    A column that Jinja cannot name, such as `Meine Frage`, gets another name in `fields`.

    Args:
        section: the key of the source in the recipe.
        filters: Jinja filters of the answer: ` | trim`.
        fields: the `fields` that the source has already.
    """
    renamed, names = dict(fields), list[str]()
    for column in (request, answer):
        name = _variable(column, {request, answer, *renamed})
        if name != column:
            renamed[name] = renamed.pop(column, column)
        names.append(name)
    user, assistant = (f"{{{{ {name} }}}}" for name in (names[0], f"{names[1]}{filters}"))
    written = f'{section}.format: {{type: template, user: "{user}", assistant: "{assistant}"}}'
    if renamed == fields:
        return written
    pairs = ", ".join(f"{_quoted(name)}: {_quoted(column)}" for name, column in renamed.items())
    return f"{section}.fields: {{{pairs}}} and {written}"


def _variable(column: str, taken: Collection[str]) -> str:
    """Return the column's name, or one like it that Jinja can name and that is not taken."""
    if reads_column(column):
        return column
    plain = re.sub(r"\W+", "_", column).strip("_")
    tries = [plain, f"column_{plain}", *(f"column_{number}" for number in range(1, 4))]
    return next(name for name in tries if reads_column(name) and name not in taken)


def _quoted(name: str) -> str:
    """Quote a name for YAML. Characters that YAML does not take as they are become escapes."""
    return json.dumps(name, ensure_ascii=not name.isprintable())
