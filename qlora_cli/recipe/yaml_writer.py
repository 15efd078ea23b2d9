"""Write values as YAML, one leaf per line, so that every YAML version reads the same.

PyYAML's own writer wraps long values, which leaves no place for a comment after each.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from qlora_cli.recipe.yaml_parser import KeyPath

Leaf = tuple[str, KeyPath | None]
"""A line, and the path of its value (None for a line that only opens a section)."""

_PLAIN = re.compile(r"[A-Za-z_/][A-Za-z0-9_/.-]*(?: [A-Za-z0-9_/.()-]+)*")
_NOT_TEXT = {"true", "false", "yes", "no", "on", "off", "y", "n", "null"}


def yaml_lines(values: dict[str, Any], path: KeyPath = ()) -> Iterator[Leaf]:
    """Yield lines of block YAML; lists of scalars stay on one line.

    Args:
        values: strings, numbers, booleans and None, in lists and dictionaries.
    """
    for key, value in values.items():
        below = (*path, key)
        name = _text(key)
        if isinstance(value, dict) and value:
            yield f"{name}:", None
            yield from _indented(yaml_lines(value, below))
        elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
            yield f"{name}:", None
            yield from _indented(_item_lines(value, below))
        else:
            yield f"{name}: {_inline(value)}", below


def _item_lines(items: list[dict[str, Any]], path: KeyPath) -> Iterator[Leaf]:
    for i, item in enumerate(items):
        mark = "- "
        for line, key in yaml_lines(item, (*path, i)):
            yield mark + line, key
            mark = "  "


def _indented(lines: Iterator[Leaf]) -> Iterator[Leaf]:
    for line, key in lines:
        yield f"  {line}", key


def _inline(value: Any) -> str:
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, list):
        return f"[{', '.join(map(_inline, value))}]"
    if isinstance(value, float):
        return _float(value)
    # The rest (null, booleans, integers, {}) is the same in JSON and YAML.
    return json.dumps(value)


def _text(text: str) -> str:
    if _PLAIN.fullmatch(text) and text.lower() not in _NOT_TEXT:
        return text
    return "".join(map(_escaped, json.dumps(text, ensure_ascii=False)))


def _escaped(character: str) -> str:
    # JSON keeps characters that end a line in YAML, or that YAML refuses.
    if character.isprintable():
        return character
    code = ord(character)
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _float(value: float) -> str:
    text = repr(value)
    # Without the point, YAML 1.1 parses 1e-08 as text.
    return text if "." in text else text.replace("e", ".0e")
