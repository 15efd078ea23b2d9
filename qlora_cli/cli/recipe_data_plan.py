"""Commands that look at a recipe and its data."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from qlora_cli.cli.options import Json, NoCache, Overrides, Quiet, RecipePath, show
from qlora_cli.errors import RecipeError
from qlora_cli.inspect.cache_text import cache_text
from qlora_cli.plan.text import plan_text, table_text
from qlora_cli.recipe.load import dump_with_origins, load_recipe


def _is_coloured() -> bool:
    # https://no-color.org
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def validate(
    recipe: RecipePath, overrides: Overrides, as_json: Json = False, quiet: Quiet = None
) -> None:
    """Check a recipe, and print all its values.

    Beside each value stands where it comes from: a line of the recipe, of a recipe that it extends,
    --set, or the default. No model or data is opened. --json prints recipe (the values) and
    origins (the place of each dotted key).

    \b
    Example:
      qlora validate recipe.yaml --set adapter.r=8
    """
    loaded = load_recipe(recipe, overrides)
    values = loaded.recipe.model_dump(mode="json")
    show({"recipe": values, "origins": loaded.origins}, as_json, dump_with_origins(loaded))


def preview(
    recipe: RecipePath,
    overrides: Overrides,
    rows: Annotated[
        int | None,
        typer.Option(
            "--rows", metavar="N", min=1, help="Rows to show of each source (3; with --json all)."
        ),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(
            "--source", metavar="NAME", help="Only rows of train, evaluation, train.0 ..."
        ),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option("--html", metavar="FILE", help="Write one HTML page, and print no text."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object a line for each row.")
    ] = False,
    no_cache: NoCache = False,
    quiet: Quiet = None,
) -> None:
    """Show what the model will see, and what in the data is often a mistake.

    Rows are prepared as for training; no weights are opened. Learnt tokens are told from the others
    by colour, or by marks where there is none (NO_COLOR is heeded). A limit (data.max_lost,
    data.audit) that is crossed is an error here too, after the report. --json prints source, row
    (its place), input_ids, labels and text of each row.

    \b
    Example:
      qlora preview recipe.yaml --rows 1
      qlora preview recipe.yaml --html preview.html
      qlora preview recipe.yaml --json --source train > rows.jsonl
    """
    loaded = load_recipe(recipe, overrides)
    from qlora_cli.inspect.preview import preview

    found = preview(loaded.recipe, source=source, use_cache=not no_cache)
    if as_json:
        for row in found.rows(rows):
            typer.echo(json.dumps(row, ensure_ascii=False))
    if html is not None:
        found.write_page(html, rows or 3, title=f"Preview of {recipe.name}")
    if html is None and not as_json:
        typer.echo(found.text(rows or 3, colour=_is_coloured()))
    found.check()


def plan(
    recipe: RecipePath,
    overrides: Overrides,
    device: Annotated[
        str,
        typer.Option(
            "--device",
            metavar="DEVICE",
            help="cpu, cuda, an amount of memory (24GiB) or a card (RTX 4090, H100 ...).",
        ),
    ] = "cuda",
    gpus: Annotated[
        int, typer.Option("--gpus", metavar="N", min=1, help="Devices that train together (1).")
    ] = 1,
    fit: Annotated[
        bool, typer.Option("--fit", help="Look for the least harmful changes with which it fits.")
    ] = False,
    table: Annotated[
        bool,
        typer.Option(
            "--table", help="Compare full, LoRA, 8-bit, QLoRA, bottleneck, at four lengths."
        ),
    ] = False,
    html: Annotated[
        Path | None,
        typer.Option("--html", metavar="FILE", help="Write a picture of it as one HTML page too."),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = None,
) -> None:
    """Say what a recipe will take: memory, by what it is for, time, and whether it fits.

    The real steps are traced on tensors without data, so no weights and no GPU are needed; of the
    model only its config.json, which is known here for well-known models. Two figures are kept
    apart: the tensors, which are traced, and all that the process takes, which is a range. --json
    prints the same in bytes and seconds.

    \b
    Example:
      qlora plan recipe.yaml --device "RTX 4090"
      qlora plan recipe.yaml --device 24GiB --set data.max_length=4096
      qlora plan recipe.yaml --device 12GiB --fit
      qlora plan recipe.yaml --device H100 --table
      qlora plan recipe.yaml --html plan.html
    """
    loaded = load_recipe(recipe, overrides)
    from qlora_cli.common.html import write_page
    from qlora_cli.plan.html import plan_page
    from qlora_cli.plan.plan import plan, plan_table

    if table:
        _refuse_beside_table(html=html is not None, fit=fit, gpus=gpus > 1)
        report = plan_table(loaded.recipe, device=device)
        show(report, as_json, table_text(report))
    else:
        report = plan(loaded.recipe, device=device, gpus=gpus, fit=fit)
        if html is not None:
            write_page(html, plan_page(report, title=f"Plan of {recipe.name}"))
        show(report, as_json, plan_text(report))


def _refuse_beside_table(**given: bool) -> None:
    why = {
        "html": "a table has no picture",
        "fit": "a table is of the methods as they are",
        "gpus": "a table is for one device",
    }
    for name in (name for name, is_given in given.items() if is_given):
        raise RecipeError(f"--{name}: {why[name]}; leave --{name} or --table out")


def show_cache(
    clear: Annotated[bool, typer.Option("--clear", help="Delete all of it.")] = False,
    as_json: Json = False,
    quiet: Quiet = None,
) -> None:
    """List the prepared data that is kept for later runs.

    It is found by its content: what other data, another tokenizer or other settings would make is
    never taken for it. It lies in $QLORA_CACHE, else ~/.cache/qlora. --json prints folder, paths,
    num_rows, size (bytes) and used (seconds since 1970) of each set.

    \b
    Example:
      qlora cache --clear
    """
    from qlora_cli.data.prepared import cache

    report = {"cleared": clear, "sets": [one.record() for one in cache.list_datasets(clear=clear)]}
    show(report, as_json, cache_text(report))


def schema() -> None:
    """Print the JSON Schema of recipes.

    \b
    Example:
      qlora schema > recipe.schema.json

    \b
    Editors with a YAML language server use it when a recipe begins with this line:
      # yaml-language-server: $schema=recipe.schema.json
    """
    from qlora_cli.recipe.json_schema import recipe_schema

    show(recipe_schema(), True, "")
