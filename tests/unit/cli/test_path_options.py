"""Every option and argument that takes a path reads `~` and refuses `$NAME`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.main import get_command

from qlora_cli.cli import app
from qlora_cli.cli.options import path_text, user_path

PATHS = {
    "ADAPTER", "DIR", "FILE", "MODEL", "NAME=PATH", "RECIPE", "RUN", "RUN_OR_MODEL", "TARGET",
    "auto|STEP|PATH", "ADAPTER...", "RECIPE...",
}  # fmt: skip
"""Names of values that are paths, in the help of the commands."""


def commands(group: Any, name: str = "qlora") -> Iterator[tuple[str, Any]]:
    if not hasattr(group, "commands"):
        yield name, group
        return
    for each, command in group.commands.items():
        yield from commands(command, f"{name} {each}")


PARAMETERS = {
    f"{name} {parameter.name}": parameter
    for name, command in commands(get_command(app))
    for parameter in command.params
}


def test_values_are_named_as_paths_or_are_not() -> None:
    """Help that mentions a file or folder belongs to a value that is read as a path."""
    unlisted = {
        name: parameter.metavar
        for name, parameter in PARAMETERS.items()
        if re.search(r"PATH|DIR|FILE|RUN|MODEL|RECIPE", parameter.metavar or "")
        and parameter.metavar not in PATHS
    }
    assert not unlisted
    assert sum(parameter.metavar in PATHS for parameter in PARAMETERS.values()) > 25


@pytest.mark.parametrize("name", [name for name, one in PARAMETERS.items() if one.metavar in PATHS])
def test_a_path_is_expanded_or_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    parameter = PARAMETERS[name]
    prefix = "name=" if parameter.metavar == "NAME=PATH" else ""
    is_list = parameter.nargs == -1 or parameter.multiple
    context = typer.Context(get_command(app))

    def read(path: str) -> object:
        value = [prefix + path] if is_list else prefix + path
        read = parameter.process_value(context, value)
        return read[0] if is_list else read

    assert str(read("~/x")) == f"{prefix}/home/ann/x"
    with pytest.raises(typer.BadParameter, match="environment variables"):
        read("$SCRATCH/x")


def test_a_hub_id_stays_as_it_is() -> None:
    assert path_text("owner/model") == "owner/model"
    assert user_path("runs/mine") == Path("runs/mine")
    with pytest.raises(typer.BadParameter):
        user_path("${X}")
