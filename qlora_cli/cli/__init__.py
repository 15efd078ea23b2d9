"""The command line: one function per command. Torch is imported by the commands that need it."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from qlora_cli import __version__
from qlora_cli.cli import (
    adapters,
    compare,
    inference,
    recipe_data_plan,
    train_evaluate_export,
)
from qlora_cli.cli.options import Quiet
from qlora_cli.common.secrets import MaskedFormatter, masked
from qlora_cli.errors import Interrupted, QloraError

log = logging.getLogger("qlora")

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"qlora {__version__}")
        raise typer.Exit


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
      qlora plan recipe.yaml --device 24GiB       # what it will take, and whether it fits
      qlora train recipe.yaml                     # the run is written to output.dir
      qlora eval runs/mine                        # base and tuned model on held-out rows
      qlora merge runs/mine --output models/mine  # a plain model folder
      qlora chat runs/mine                        # talk to it

    Results go to stdout, progress and errors to stderr.

    \b
    Exit codes:
      0    done
      1    an error of ours: please report it
      2    the command line, the recipe or the data cannot be used
      3    the model cannot be found, loaded, adapted or merged
      4    training stopped before its end, or its result cannot be trusted
      5    stopped by training.stop_after, and saved: --resume goes on
      6    out of memory in training; what was learnt is saved
      7    a run that was repeated (rerun) has another result
      8    a comparison has cells that failed; the others are done
      130  interrupted (Ctrl-C); a run is saved first
      143  the same by SIGTERM
    """


app.command()(train_evaluate_export.train)
app.command()(train_evaluate_export.rerun)
app.command()(train_evaluate_export.bench)
app.command()(compare.compare)
app.command("eval")(train_evaluate_export.evaluate)
app.command()(train_evaluate_export.merge)
app.command("export")(train_evaluate_export.export_model)
app.command()(inference.chat)
app.command()(inference.generate)
app.command()(recipe_data_plan.validate)
app.command()(recipe_data_plan.preview)
app.command()(recipe_data_plan.plan)
app.command("cache")(recipe_data_plan.show_cache)
app.command()(recipe_data_plan.schema)

adapters_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="What adapters are, how they differ, and several made into one.",
)
app.add_typer(adapters_app, name="adapters")
adapters_app.command("list")(adapters.list_adapters)
adapters_app.command("inspect")(adapters.inspect_adapter)
adapters_app.command("diff")(adapters.diff_adapters)
adapters_app.command("combine")(adapters.combine_adapters)


def main(args: Sequence[str] | None = None) -> None:
    """Run one command line (by default the one of this process) and exit with its code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="surrogateescape")
    handler = logging.StreamHandler()
    handler.setFormatter(MaskedFormatter())
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        app(args=args, prog_name="qlora")
    except QloraError as error:
        typer.echo(f"error: {masked(str(error))}", err=True)
        if error.hint:
            typer.echo(f"hint: {masked(error.hint)}", err=True)
        sys.exit(error.exit_code)
    except Interrupted as error:
        sys.exit(error.exit_code)
    finally:
        log.removeHandler(handler)
