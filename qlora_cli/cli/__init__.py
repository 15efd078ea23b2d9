"""The command line: one function per command. A command imports torch only when it runs."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Annotated

import typer

from qlora_cli.cli import (
    adapters,
    compare,
    inference,
    recipe_data_plan,
    train_evaluate_export,
)
from qlora_cli.cli.commands import Commands, with_recipe
from qlora_cli.cli.options import Quiet
from qlora_cli.common.secrets import MaskedFormatter, masked
from qlora_cli.common.standard_output import guarded_output, write_output
from qlora_cli.common.version import __version__
from qlora_cli.errors import EXIT_CODES, Interrupted, QloraError

log = logging.getLogger("qlora")

app = typer.Typer(
    add_completion=False,
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        write_output(f"qlora {__version__}\n")
        raise typer.Exit


Version = Annotated[
    bool,
    typer.Option("--version", is_eager=True, callback=_show_version, help="Print the version."),
]


_EXIT_CODES = "\n".join(f"  {code:<4} {meaning}" for code, meaning in EXIT_CODES.items())

_HELP = f"""Fine-tune language models from one YAML recipe.

\b
Example:
  qlora validate recipe.yaml                  # every value, and where it comes from
  qlora preview recipe.yaml                   # the rows as the model sees them
  qlora plan recipe.yaml --device 24GiB       # memory and time, and whether it fits
  qlora train recipe.yaml                     # writes the run to output.dir
  qlora eval runs/mine                        # base and tuned model on held-out rows
  qlora merge runs/mine --output models/mine  # a plain model folder
  qlora chat runs/mine                        # talk to the tuned model

Results go to stdout, progress and errors to stderr.

The objective of a recipe learns from answers (supervised), from pairs of a better and a worse one
(dpo, orpo, simpo, reward), from answers that are good or bad (kto), or from labels (classify).

\b
Exit codes:
{_EXIT_CODES}
"""


@app.callback(help=_HELP)
def qlora(version: Version = False, quiet: Quiet = None) -> None:
    """Declare the options that stand before a command."""


def _add(group: typer.Typer, name: str, command: Callable[..., None]) -> None:
    """Add a command. The list of commands shows the first line of its docstring, never cut."""
    summary = (command.__doc__ or "").partition("\n")[0]
    group.command(name, short_help=summary)(command)


_add(app, "train", train_evaluate_export.train)
_add(app, "rerun", train_evaluate_export.rerun)
_add(app, "bench", train_evaluate_export.bench)
_add(app, "compare", compare.compare)
_add(app, "eval", train_evaluate_export.evaluate)
_add(app, "merge", train_evaluate_export.merge)
_add(app, "export", train_evaluate_export.export_model)
_add(app, "chat", inference.chat)
_add(app, "generate", inference.generate)
_add(app, "predict", inference.predict)
_add(app, "validate", recipe_data_plan.validate)
_add(app, "preview", recipe_data_plan.preview)
_add(app, "plan", recipe_data_plan.plan)
_add(app, "cache", recipe_data_plan.show_cache)
_add(app, "schema", recipe_data_plan.schema)

adapters_app = typer.Typer(cls=Commands, no_args_is_help=True, rich_markup_mode=None)
_ADAPTERS = "List, inspect, compare and combine adapters."
app.add_typer(adapters_app, name="adapters", help=_ADAPTERS, short_help=_ADAPTERS)
_add(adapters_app, "list", adapters.list_adapters)
_add(adapters_app, "inspect", adapters.inspect_adapter)
_add(adapters_app, "diff", adapters.diff_adapters)
_add(adapters_app, "combine", adapters.combine_adapters)


def main(args: Sequence[str] | None = None) -> None:
    """Run a command line (default: that of this process) and exit with its code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="surrogateescape")
    handler = logging.StreamHandler()
    handler.setFormatter(MaskedFormatter())
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        with guarded_output():  # of the help too
            app(args=args, prog_name="qlora")
    except QloraError as error:
        typer.echo(f"error: {masked(str(error))}", err=True)
        if error.hint:
            hint = with_recipe(error.hint, sys.argv[1:] if args is None else args)
            typer.echo(f"hint: {masked(hint)}", err=True)
        sys.exit(error.exit_code)
    except Interrupted as error:
        if error.kept is not None:
            log.warning("stopped by %s: %s", error, error.kept)
        sys.exit(error.exit_code)
    finally:
        log.removeHandler(handler)
