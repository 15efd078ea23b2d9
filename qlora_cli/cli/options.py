"""Arguments and options that commands share, and the printing of their reports."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import typer

from qlora_cli.common.standard_output import write_output
from qlora_cli.common.user_paths import expand_path
from qlora_cli.types import GGUF_KINDS

log = logging.getLogger("qlora")


def _set_level(quiet: bool | None) -> None:
    if quiet is not None:
        log.setLevel(logging.WARNING if quiet else logging.DEBUG)


def _decoded(overrides: list[str]) -> list[str]:
    # Under LC_ALL=C the arguments reach us as ASCII, other bytes escaped.
    return [os.fsencode(override).decode("utf-8", "replace") for override in overrides]


def decoded_text(text: str | None) -> str | None:
    """Decode the text of an option: under LC_ALL=C, arguments are read as ASCII."""
    return None if text is None else _decoded([text])[0]


def user_path(text: str | Path) -> Path:
    """Read the path of an option or argument: `~` is expanded, `$NAME` refused."""
    return Path(path_text(str(text)))


def path_text(text: str) -> str:
    """Do the same with a path that may also be another word, such as the id of a model."""
    try:
        return expand_path(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def _model_path(text: str) -> str:
    return path_text(_decoded([text])[0])


def _adapter_paths(texts: list[str]) -> list[str]:
    parts = (text.partition("=") for text in _decoded(texts))
    return [f"{name}{equals}{path_text(path)}" for name, equals, path in parts]


def _known_kinds(kinds: list[str]) -> list[str]:
    if unknown := sorted(set(kinds) - set(GGUF_KINDS)):
        raise typer.BadParameter(f"{unknown[0]!r} is not one of {', '.join(GGUF_KINDS)}")
    return kinds


RecipePath = Annotated[
    Path, typer.Argument(parser=user_path, metavar="RECIPE", help="The recipe, a YAML file.")
]
Overrides = Annotated[
    list[str],
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        default_factory=list,
        show_default=False,
        callback=_decoded,
        help="Override a key, such as adapter.r=8 (repeatable).",
    ),
]
WeightsOption = Annotated[
    Literal["last", "best"],
    typer.Option(
        "--weights",
        metavar="last|best",
        help="Weights after the last step, or those with the best evaluation.",
    ),
]
GgufOption = Annotated[
    list[str],
    typer.Option(
        "--gguf",
        metavar="KIND",
        default_factory=list,
        show_default=False,
        callback=_known_kinds,
        help=f"Write a GGUF file too: {', '.join(GGUF_KINDS)} (repeatable).",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
NoCache = Annotated[
    bool, typer.Option("--no-cache", help="Prepare the data again; do not use or write the cache.")
]
Quiet = Annotated[
    bool | None,
    typer.Option(
        "--quiet/--verbose",
        "-q/-v",
        callback=_set_level,
        help="Decrease or increase log verbosity (stderr).",
    ),
]
ModelPath = Annotated[
    str,
    typer.Argument(
        metavar="RUN_OR_MODEL",
        callback=_model_path,
        help="Folder of a run, adapter or model; or a recipe, a GGUF file, a Hub id.",
    ),
]
Adapters = Annotated[
    list[str],
    typer.Option(
        "--adapter",
        metavar="NAME=PATH",
        default_factory=list,
        show_default=False,
        callback=_adapter_paths,
        help="Load another run or adapter over the same base (repeatable).",
    ),
]
System = Annotated[
    str | None,
    typer.Option(
        "--system",
        metavar="TEXT",
        callback=decoded_text,
        help="System message (default: the recipe's).",
    ),
]
Temperature = Annotated[
    float,
    typer.Option(
        "--temperature", metavar="T", min=0, help="Sampling temperature; 0 (default) is greedy."
    ),
]
TopP = Annotated[
    float,
    typer.Option(
        "--top-p",
        metavar="P",
        min=0,
        max=1,
        help="Sample from the most likely tokens with this total probability (1).",
    ),
]
TopK = Annotated[
    int,
    typer.Option(
        "--top-k", metavar="K", min=0, help="Sample from the K most likely tokens (0 = all)."
    ),
]
MaxNewTokens = Annotated[
    int,
    typer.Option("--max-new-tokens", metavar="N", min=1, help="Maximum tokens of an answer (512)."),
]
Seed = Annotated[
    int, typer.Option("--seed", metavar="N", min=0, help="Seed of the random generator (0).")
]
AdapterPath = Annotated[
    Path, typer.Argument(parser=user_path, metavar="ADAPTER", help="Folder of a run or an adapter.")
]


def show(report: Mapping[str, object], as_json: bool, text: str) -> None:
    """Print a report as one JSON document, or as text."""
    # With several training processes, only the first one prints.
    if os.environ.get("RANK", "0") == "0":
        shown = json.dumps(report, indent=2, ensure_ascii=False) if as_json else text.rstrip()
        write_output(f"{shown}\n")
