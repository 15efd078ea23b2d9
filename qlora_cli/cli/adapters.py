"""Adapter commands: list, inspect, diff, combine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qlora_cli.cli.options import AdapterPath, Json, Overrides, Quiet, Seed, show, user_path
from qlora_cli.inspect.adapters_text import diff_text, inspect_text, list_text


def list_adapters(
    folder: Annotated[
        Path, typer.Argument(parser=user_path, metavar="DIR", help="Folder to search.")
    ],
    as_json: Json = False,
    quiet: Quiet = None,
) -> None:
    """List the adapters in a folder and below, including those of runs.

    --json prints folder and adapters (path, base, type, r, alpha, target_modules, bytes, steps,
    best).

    \b
    Example:
      qlora adapters list runs
    """
    from qlora_cli.inspect.adapters import list_adapters

    report = list_adapters(folder)
    show(report.to_json(), as_json, list_text(report))


def inspect_adapter(adapter: AdapterPath, as_json: Json = False, quiet: Quiet = None) -> None:
    """Show an adapter's settings, and how much it changes each weight.

    For each kind of module and each layer: the norm of the updates (scale B A), their largest
    singular value, and their mean effective rank. --json lists every module.

    \b
    Example:
      qlora adapters inspect runs/mine
    """
    from qlora_cli.inspect.adapters import inspect

    report = inspect(adapter)
    show(report.to_json(), as_json, inspect_text(report))


def diff_adapters(
    first: AdapterPath, second: AdapterPath, as_json: Json = False, quiet: Quiet = None
) -> None:
    """Compare two adapters of one base, weight by weight.

    For each weight: the cosine of the two updates, the second norm divided by the first, and the
    norm of the difference divided by the first norm. --json prints first, second, settings (the
    different ones), cosine, norm_ratio, distance, modules, only_first and only_second.

    \b
    Example:
      qlora adapters diff runs/mine runs/other
    """
    from qlora_cli.inspect.adapters import diff

    report = diff(first, second)
    show(report.to_json(), as_json, diff_text(report))


def combine_adapters(
    paths: Annotated[
        list[Path],
        typer.Argument(parser=user_path, metavar="ADAPTER...", help="Folders of runs or adapters."),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output", parser=user_path, metavar="DIR", help="Folder to create; it must not exist."
        ),
    ],
    overrides: Overrides,
    method: Annotated[
        str,
        typer.Option(
            "--method",
            metavar="METHOD",
            help="PEFT method: cat, linear, svd, ties, dare_linear, dare_ties, magnitude_prune; "
            "the last four also with the suffix _svd.",
        ),
    ] = "cat",
    weights: Annotated[
        str | None,
        typer.Option(
            "--weights", metavar="W,W,...", help="Weight of each adapter (default: equal, sum 1)."
        ),
    ] = None,
    density: Annotated[
        float,
        typer.Option(
            "--density",
            metavar="D",
            min=0,
            max=1,
            help="Fraction of values kept by ties, dare and magnitude_prune (0.5).",
        ),
    ] = 0.5,
    rank: Annotated[
        int | None,
        typer.Option("--rank", metavar="R", min=1, help="Rank of the result, for svd methods."),
    ] = None,
    seed: Seed = 0,
    no_eval: Annotated[
        bool, typer.Option("--no-eval", help="Do not evaluate the result and its parents.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = None,
) -> None:
    """Combine several adapters into one.

    cat is the exact weighted sum, with the sum of the ranks; svd is its best approximation of a
    given rank; the other methods approximate it in other ways. The distance from the weighted sum
    is printed. The result is an adapter folder with the recipe of the first parent that is a run;
    chat, eval and merge accept it like a run. If that recipe has evaluation data (or
    --set data.evaluation.path=...), the result and each parent are evaluated.

    \b
    Example:
      qlora adapters combine runs/a runs/b --weights 0.7,0.3 --output runs/a-and-b
    """
    from qlora_cli.export.combine_adapters import CombineOptions, combine, read_weights
    from qlora_cli.export.combine_report import combine_text

    report = combine(
        paths,
        output,
        CombineOptions(method, density, rank, seed),
        overrides,
        weights=read_weights(weights),
        measure=not no_eval,
    )
    show(report.to_json(), as_json, combine_text(report))
