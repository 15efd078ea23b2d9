"""Values in messages: text is quoted, and nothing else is."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from qlora_cli.common.formatting import value_text

PACKAGE = Path(__file__).parents[3] / "qlora_cli"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("fast", '"fast"'),
        ("a\nb", '"a b"'),
        ("x" * 70, f'"{"x" * 60}..."'),
        ("", '""'),
        (7, "7"),
        (2e-4, "0.0002"),
        (True, "true"),
        (None, "null"),
    ],
)
def test_a_value_is_written_as_in_yaml(value: object, text: str) -> None:
    assert value_text(value) == text


def quoting(part: ast.expr) -> bool:
    """Tell if a message formats this part of it with a helper, or with `!r` as part of a row."""
    assert isinstance(part, ast.FormattedValue)
    return isinstance(part.value, ast.Call) or part.conversion == ord("r")


def test_every_message_quotes_the_value_that_it_found() -> None:
    """`found {value}` is a helper's result, a number or a list of names that is quoted already."""
    bare = set()
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.JoinedStr):
                continue
            for before, part in zip(node.values, node.values[1:], strict=False):
                is_found = isinstance(before, ast.Constant) and str(before.value).endswith("found ")
                if is_found and isinstance(part, ast.FormattedValue) and not quoting(part):
                    bare.add(f"{path.relative_to(PACKAGE)}: {ast.unparse(part.value)}")
    assert bare == {
        "data/formats/fields.py: shown or 'nothing'",
        "data/prompts.py: ', '.join(map(repr, row)) or 'nothing'",
        "data/scored_rows.py: ', '.join(map(repr, row)) or 'nothing'",
        "data/sources/strict_json.py: found",
        "recipe/load.py: found",
    }
