"""The command line: one function per command. Torch is imported by the commands that need it."""

from __future__ import annotations

import io
import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from qlora_cli import __version__
from qlora_cli.errors import QloraError
from qlora_cli.recipe_file import dump_with_origins, load_recipe
from qlora_cli.report_text import cache_text, evaluation_table, merge_text, run_text

log = logging.getLogger("qlora")

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _set_level(quiet: bool | None) -> None:
    if quiet is not None:
        log.setLevel(logging.WARNING if quiet else logging.DEBUG)


def _decoded(overrides: list[str]) -> list[str]:
    # Under LC_ALL=C the arguments reach us as ASCII, other bytes escaped.
    return [os.fsencode(override).decode("utf-8", "replace") for override in overrides]


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"qlora {__version__}")
        raise typer.Exit


RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.")]
Overrides = Annotated[
    list[str],
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        default_factory=list,
        show_default=False,
        callback=_decoded,
        help="Another value for a key, such as adapter.r=8 (can be given more than once).",
    ),
]
WeightsOption = Annotated[
    Literal["last", "best"],
    typer.Option(
        "--weights",
        metavar="last|best",
        help="After the last step, or at the lowest evaluation loss.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
NoCache = Annotated[
    bool, typer.Option("--no-cache", help="Prepare the data anew, and keep none of it.")
]
Quiet = Annotated[
    bool | None,
    typer.Option(
        "--quiet/--verbose",
        "-q/-v",
        callback=_set_level,
        help="Say less, or more, on the way (on stderr).",
    ),
]
Version = Annotated[
    bool,
    typer.Option("--version", is_eager=True, callback=_show_version, help="Print the version."),
]


@app.callback()
def qlora(version: Version = False, quiet: Quiet = None) -> None:
    """Fine-tune language models from one YAML recipe.

    \b
    Example:
      qlora validate recipe.yaml                  # every value, and where it comes from
      qlora preview recipe.yaml                   # what the model will see
      qlora train recipe.yaml                     # the run is written to output.dir
      qlora eval runs/mine                        # base and tuned model on held-out rows
      qlora merge runs/mine --output models/mine  # a plain model folder

    Results go to stdout, progress and errors to stderr.

    \b
    Exit codes:
      0    done
      1    an error of ours: please report it
      2    the command line, the recipe or the data cannot be used
      3    the model cannot be found, loaded, adapted or merged
      4    training stopped before its end, or its result cannot be trusted
      130  interrupted (Ctrl-C)
    """


@app.command()
def train(
    recipe: RecipePath,
    overrides: Overrides,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint in output.dir.")
    ] = False,
    no_cache: NoCache = False,
    as_json: Json = False,
    quiet: Quiet = None,
) -> None:
    """Train, and write the run to output.dir.

    --json prints the record of the run, which is also its run.json.

    \b
    Example:
      qlora train recipe.yaml --set training.max_steps=100 --set output.dir=runs/short
    """
    loaded = load_recipe(recipe, overrides)
    from qlora_cli.train import train

    report = train(loaded.recipe, resume=resume, use_cache=not no_cache, origins=loaded.origins)
    _show(report, as_json, run_text(loaded.recipe.output.dir, report))


@app.command("eval")
def evaluate(
    target: Annotated[
        Path, typer.Argument(metavar="RUN_OR_RECIPE", help="The folder of a run, or a recipe.")
    ],
    overrides: Overrides,
    weights: WeightsOption = "last",
    as_json: Json = False,
    quiet: Quiet = None,
) -> None:
    """Measure a run beside its base model.

    Given a recipe, it measures the base model alone. --json prints target, weights, rows,
    supervised_tokens and models: base and tuned, each with loss, perplexity and tasks (score and
    rows of each).

    \b
    Example:
      qlora eval runs/mine --set data.evaluation.path=other.jsonl
    """
    from qlora_cli.evaluate import evaluate

    report = evaluate(target, overrides, weights=weights)
    _show(report, as_json, evaluation_table(report))


@app.command()
def merge(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")],
    output: Annotated[
        Path, typer.Option("--output", metavar="DIR", help="Folder to make; it must not exist.")
    ],
    overrides: Overrides,
    weights: WeightsOption = "last",
    as_json: Json = False,
    quiet: Quiet = None,
) -> None:
    """Write a plain model: base plus adapter.

    The written model is loaded again and compared with base plus adapter before this says it is
    done. --json prints output, weights, dtype, bytes, logit_error, kl, top1_agreement and
    kl_as_trained.

    \b
    Example:
      qlora merge runs/mine --output models/mine
      qlora merge runs/mine --output models/mine --set model.path=where/the/base/is/now
    """
    from qlora_cli.merge import merge

    report = merge(run, output, overrides, weights=weights)
    _show(report, as_json, merge_text(report))


@app.command()
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
    _show({"recipe": values, "origins": loaded.origins}, as_json, dump_with_origins(loaded))


@app.command()
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
    by colour, or by marks where there is none (NO_COLOR is heeded). A limit of data.audit that is
    crossed is an error here too, after the report. --json prints source, row (its place),
    input_ids, labels and text of each row.

    \b
    Example:
      qlora preview recipe.yaml --rows 1
      qlora preview recipe.yaml --html preview.html
      qlora preview recipe.yaml --json --source train > rows.jsonl
    """
    loaded = load_recipe(recipe, overrides)
    from qlora_cli.preview import preview

    found = preview(loaded.recipe, source=source, use_cache=not no_cache)
    if as_json:
        for row in found.rows(rows):
            typer.echo(json.dumps(row, ensure_ascii=False))
    if html is not None:
        found.write_page(html, rows or 3, title=f"Preview of {recipe.name}")
    if html is None and not as_json:
        typer.echo(found.text(rows or 3, colour=_is_coloured()))
    found.check()


@app.command("cache")
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
    from qlora_cli.data import cache

    report = {"cleared": clear, "sets": [one.record() for one in cache.list_sets(clear=clear)]}
    _show(report, as_json, cache_text(report))


@app.command()
def schema() -> None:
    """Print the JSON Schema of recipes.

    \b
    Example:
      qlora schema > recipe.schema.json

    \b
    Editors with a YAML language server use it when a recipe begins with this line:
      # yaml-language-server: $schema=recipe.schema.json
    """
    from qlora_cli.recipe_schema import recipe_schema

    _show(recipe_schema(), True, "")


def _is_coloured() -> bool:
    # https://no-color.org
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def _show(report: Mapping[str, object], as_json: bool, text: str) -> None:
    # Of several processes that train together, one speaks.
    if os.environ.get("RANK", "0") == "0":
        typer.echo(json.dumps(report, indent=2, ensure_ascii=False) if as_json else text.rstrip())


def main(args: Sequence[str] | None = None) -> None:
    """Run one command line (by default the one of this process) and exit with its code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="surrogateescape")
    handler = logging.StreamHandler()
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        app(args=args, prog_name="qlora")
    except QloraError as error:
        typer.echo(f"error: {error}", err=True)
        if error.hint:
            typer.echo(f"hint: {error.hint}", err=True)
        sys.exit(error.exit_code)
    finally:
        log.removeHandler(handler)
