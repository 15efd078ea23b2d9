"""The generated reference: each variant has its own keys, and nothing is cut or run together."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field
from typer.main import get_command

from qlora_cli.cli import app
from qlora_cli.common.config import Config
from scripts.gen_docs import Sections, _section, cli_page, recipe_page


class Rows(Config):
    """Rows."""

    path: str = "rows.jsonl"
    """Their file."""


class Plain(Config):
    """Plain."""

    type: Literal["plain", "flat"] = "plain"
    data: Rows | None = None
    """Rows of the plain one."""
    size: int = 1
    """Its size."""


class Fancy(Config):
    """Fancy."""

    type: Literal["fancy"] = "fancy"
    data: Rows
    """Rows of the fancy one."""
    size: int = 2
    """Its size."""


class Owner(Config):
    """A section with variants that declare the same keys differently."""

    one: Annotated[Plain | Fancy, Field(discriminator="type")] = Plain()
    """One of them."""
    again: Annotated[Plain | Fancy, Field(discriminator="type")] = Plain()
    """The same again."""


def test_variants_show_their_own_defaults_and_sections() -> None:
    seen: Sections = {}
    text = "\n".join(
        line
        for name, info in Owner.model_fields.items()
        for line in _section(name, info, "Either.", seen)
    )
    plain, fancy = text.index("`plain`, `flat`:\n"), text.index("`fancy`:\n")
    assert "| `size` | a whole number | `1` |" in text[plain:fancy]
    assert "| `data` | a section (below), or null | `null` |" in text[plain:fancy]
    assert "| `size` | a whole number | `2` |" in text[fancy:]
    assert "| `data` | a section (below) | required |" in text[fancy:]
    assert "### `one.data` of `plain`, `flat`\n\nRows of the plain one. Optional.\n" in text
    assert "### `one.data` of `fancy`\n\nRows of the fancy one. Required.\n" in text
    assert "It has the same keys as `one.data` of `plain`, `flat`." in text
    assert "## `again`\n\nEither. Default: `{type: plain}`.\n" in text
    assert "It has the same keys as `one`." in text


def test_every_task_says_which_rows_it_needs() -> None:
    headings = re.findall(r"#### `evaluation.tasks.data` of (.*)\n\n(.*)\n", recipe_page())
    assert [about.split()[-1] for _, about in headings] == ["Optional.", "Required."]
    assert headings[1][0] == "`perplexity`"


def test_the_page_of_commands_has_no_runs_of_blanks() -> None:
    for line in cli_page().splitlines():
        before_comment = line.split("  #")[0].strip()
        is_exit_code = re.match(r"\d+ ", line)
        assert is_exit_code or not re.search(r"\S {2,}\S", before_comment), line


@pytest.mark.parametrize("width", [40, 60, 80])
def test_summaries_in_the_list_of_commands_are_whole(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    root: Any = get_command(app)
    for group in (root, root.commands["adapters"]):
        with group.make_context("qlora", [], resilient_parsing=True) as context:
            listed = " ".join(group.get_help(context).partition("Commands:")[2].split())
        for name, command in group.commands.items():
            summary = " ".join(command.help.partition("\n\n")[0].split())
            assert f"{name} {summary}" in listed
