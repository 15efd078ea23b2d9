"""Commands for a recipe and its data: validate, preview, plan, cache, schema."""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qlora_cli.cli.options import Json, NoCache, Overrides, Quiet, RecipePath, show, user_path
from qlora_cli.common.standard_output import write_output
from qlora_cli.errors import RecipeError
from qlora_cli.inspect.cache_text import cache_text
from qlora_cli.plan.text import plan_text, table_text

if TYPE_CHECKING:
    from qlora_cli.recipe.load import LoadedRecipe

log = logging.getLogger("qlora")


def _is_coloured() -> bool:
    # https://no-color.org
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def validate(
    recipe: RecipePath,
    overrides: Overrides,
    deep: Annotated[
        bool,
        typer.Option("--deep", help="Also check base, tokenizer and adapter together (a second)."),
    ] = False,
    as_json: Json = False,
    quiet: Quiet = None,
) -> None:
    """Check a recipe, and print all its values with their origins.

    An origin is a line of the recipe or of a recipe that it extends, --set, or the default.
    Settings without effect and local files that are not on this machine are warned of, and packages
    that are missing are refused. Without --deep no model or data is opened. --deep refuses missing
    files, takes one row through forward, backward, save, load and merge on a miniature of the base,
    compares the tokenizer with the embedding, and reads the first rows of each source. --json
    prints recipe (the values), origins (the place of each dotted key), and with --deep
    compatibility.

    \b
    Example:
      qlora validate recipe.yaml --set adapter.r=8
      qlora validate recipe.yaml --deep
    """
    from qlora_cli.recipe.load import dump_with_origins, load_recipe
    from qlora_cli.recipe.packages import require_packages
    from qlora_cli.recipe.without_effect import settings_without_effect

    loaded = load_recipe(recipe, overrides)
    require_packages(loaded.recipe, for_tasks=True)
    loaded.recipe.data.require_rows(loaded.recipe.objective, opens_files=False)
    for line in settings_without_effect(loaded.recipe, loaded.recipe.training.max_steps):
        log.warning(line)
    report: dict[str, object] = {
        "recipe": loaded.recipe.model_dump(mode="json"),
        "origins": loaded.origins,
    }
    text = dump_with_origins(loaded)
    if deep:
        from qlora_cli.plan.compatibility import check_compatibility, compatibility_text

        found = check_compatibility(loaded.recipe)
        report["compatibility"] = found.to_json()
        text = f"{text.rstrip()}\n# {compatibility_text(found)}"
    _report_missing_inputs(loaded, recipe.parent, refuse=deep)
    show(report, as_json, text)


def _report_missing_inputs(loaded: LoadedRecipe, folder: Path, *, refuse: bool) -> None:
    """Warn of local files that are not here, or refuse them all."""
    from qlora_cli.recipe.missing_inputs import missing_inputs

    lines = [
        f"{loaded.origins[found.key]}  {found.problem(folder)}"
        for found in missing_inputs(loaded.recipe)
    ]
    if lines and refuse:
        raise RecipeError(
            "\n".join(lines if len(lines) == 1 else [f"{len(lines)} problems", *lines]),
            hint="without --deep, qlora validate checks a recipe for another machine",
        )
    for line in lines:
        log.warning(line)


def preview(
    recipe: RecipePath,
    overrides: Overrides,
    rows: Annotated[
        int | None,
        typer.Option(
            "--rows", metavar="N", min=1, help="Rows to show per source (3; with --json, all)."
        ),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(
            "--source", metavar="NAME", help="Show only this source: train, evaluation, train.0 ..."
        ),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(
            "--html",
            parser=user_path,
            metavar="FILE",
            help="Write one HTML page instead of printing.",
        ),
    ] = None,
    bad_rows: Annotated[
        Path | None,
        typer.Option(
            "--bad-rows",
            metavar="FILE",
            parser=user_path,
            help="Also write every bad row, with its reason, as JSON lines.",
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object per row, one per line.")
    ] = False,
    no_cache: NoCache = False,
    quiet: Quiet = None,
) -> None:
    """Show the rows as the model sees them.

    Common mistakes in the data are reported too. Rows are prepared as for training; no weights are
    loaded. Supervised tokens are coloured, or marked where colour is off (NO_COLOR is respected).
    As in training, exceeding data.max_lost or data.audit is an error, here after the report. --json
    prints source, row (its place), input_ids, labels and text of each row.

    \b
    Example:
      qlora preview recipe.yaml --rows 1
      qlora preview recipe.yaml --html preview.html
      qlora preview recipe.yaml --json --source train > rows.jsonl
      qlora preview recipe.yaml --bad-rows bad.jsonl
    """
    from qlora_cli.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides)
    from qlora_cli.inspect.bad_rows import write_bad_rows
    from qlora_cli.inspect.preview import preview

    if bad_rows is not None:
        write_bad_rows(loaded.recipe, bad_rows)
    found = preview(loaded.recipe, source=source, use_cache=not no_cache)
    if as_json:
        for row in found.rows(rows):
            write_output(f"{json.dumps(row.to_json(), ensure_ascii=False)}\n")
    if html is not None:
        found.write_page(html, rows or 3, title=f"Preview of {recipe.name}")
    if html is None and not as_json:
        write_output(f"{found.text(rows or 3, colour=_is_coloured())}\n")
    found.check()


def plan(
    recipe: RecipePath,
    overrides: Overrides,
    device: Annotated[
        str,
        typer.Option(
            "--device",
            metavar="DEVICE",
            help="cpu, cuda, a memory size (24GiB) or a GPU name (RTX 4090, H100 ...).",
        ),
    ] = "cuda",
    gpus: Annotated[
        int,
        typer.Option(
            "--gpus", metavar="N", min=1, help="Number of devices that train together (1)."
        ),
    ] = 1,
    fit: Annotated[
        bool, typer.Option("--fit", help="Find the least harmful changes that make it fit.")
    ] = False,
    table: Annotated[
        bool,
        typer.Option(
            "--table", help="Compare full, LoRA, 8-bit, QLoRA and bottleneck at four lengths."
        ),
    ] = False,
    html: Annotated[
        Path | None,
        typer.Option(
            "--html",
            parser=user_path,
            metavar="FILE",
            help="Also write the plan as an HTML page with a chart.",
        ),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = None,
) -> None:
    """Predict a recipe's memory and time, and whether it fits.

    The real steps are traced on tensors without data: no weights and no GPU are needed, only the
    model's config.json (built in for well-known models). The memory of tensors is traced; the
    memory of the whole process is a range. --json prints the same in bytes and seconds.

    \b
    Example:
      qlora plan recipe.yaml --device "RTX 4090"
      qlora plan recipe.yaml --device 24GiB --set data.max_length=4096
      qlora plan recipe.yaml --device 12GiB --fit
      qlora plan recipe.yaml --device H100 --table
      qlora plan recipe.yaml --html plan.html
    """
    from qlora_cli.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides)
    from qlora_cli.common.html import write_page
    from qlora_cli.plan.html import plan_page
    from qlora_cli.plan.plan import plan, plan_table

    if table:
        _refuse_beside_table(html=html is not None, fit=fit, gpus=gpus > 1)
        compared = plan_table(loaded.recipe, device=device)
        show(compared.to_json(), as_json, table_text(compared))
    else:
        report = plan(loaded.recipe, device=device, gpus=gpus, fit=fit)
        if html is not None:
            write_page(html, plan_page(report, title=f"Plan of {recipe.name}"))
        show(report.to_json(), as_json, plan_text(report))


def _refuse_beside_table(**given: bool) -> None:
    why = {
        "html": "the table has no HTML page",
        "fit": "the table shows the methods unchanged",
        "gpus": "the table is for one device",
    }
    for name in (name for name, is_given in given.items() if is_given):
        raise RecipeError(f"--{name} and --table: {why[name]}; leave one of them out")


def show_cache(
    clear: Annotated[bool, typer.Option("--clear", help="Delete everything listed.")] = False,
    as_json: Json = False,
    quiet: Quiet = None,
) -> None:
    """List the prepared data that later runs can reuse.

    The key is a digest of the data, the tokenizer and the settings, so a change of any of them is
    never served from the cache. The cache is in $QLORA_CACHE (default: ~/.cache/qlora). --json
    prints folder, paths, num_rows, size (bytes) and used (seconds since 1970) of each set.

    \b
    Example:
      qlora cache --clear
    """
    from qlora_cli.data.prepared import cache

    report = {"cleared": clear, "sets": [one.record() for one in cache.list_datasets(clear=clear)]}
    show(report, as_json, cache_text(report))


def schema() -> None:
    """Print the JSON Schema of recipes, for editors.

    \b
    Example:
      qlora schema > recipe.schema.json

    \b
    Editors with a YAML language server use it if a recipe begins with this line:
      # yaml-language-server: $schema=recipe.schema.json
    """
    from qlora_cli.recipe.json_schema import recipe_schema

    show(recipe_schema(), True, "")
