"""Commands about adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qlora_cli.cli.options import AdapterPath, Json, Overrides, Quiet, Seed, show
from qlora_cli.inspect.adapters_text import combine_text, diff_text, inspect_text, list_text


def list_adapters(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to look in.")],
    as_json: Json = False,
    quiet: Quiet = None,
) -> None:
    """List the adapters under a folder, those of runs among them.

    --json prints folder and adapters: path, base, type, r, alpha, target_modules, bytes, steps and
    best of each.

    \b
    Example:
      qlora adapters list runs
    """
    from qlora_cli.inspect.adapters import list_adapters

    report = list_adapters(folder)
    show(report, as_json, list_text(report))


def inspect_adapter(adapter: AdapterPath, as_json: Json = False, quiet: Quiet = None) -> None:
    """Say what an adapter is, and how much it changes which weights.

    For each kind of module and each layer: the norm of the updates (scale B A), the largest of
    their singular values, and the mean of their effective ranks. --json has all modules.

    \b
    Example:
      qlora adapters inspect runs/mine
    """
    from qlora_cli.inspect.adapters import inspect

    report = inspect(adapter)
    show(report, as_json, inspect_text(report))


def diff_adapters(
    first: AdapterPath, second: AdapterPath, as_json: Json = False, quiet: Quiet = None
) -> None:
    """Say how two adapters of one base differ, weight by weight.

    Cosine of the updates; the second norm over the first; norm of the difference over the first
    norm. --json prints first, second, settings (those that differ), cosine, norm_ratio, distance,
    modules, only_first and only_second.

    \b
    Example:
      qlora adapters diff runs/mine runs/other
    """
    from qlora_cli.inspect.adapters import diff

    report = diff(first, second)
    show(report, as_json, diff_text(report))


def combine_adapters(
    paths: Annotated[
        list[Path], typer.Argument(metavar="ADAPTER...", help="Folders of runs or adapters.")
    ],
    output: Annotated[
        Path, typer.Option("--output", metavar="DIR", help="Folder to make; it must not exist.")
    ],
    overrides: Overrides,
    method: Annotated[
        str,
        typer.Option(
            "--method",
            metavar="METHOD",
            help="Of PEFT's: cat, linear, svd, ties, dare_linear, dare_ties, magnitude_prune, or "
            "the last four with _svd.",
        ),
    ] = "cat",
    weights: Annotated[
        str | None,
        typer.Option("--weights", metavar="W,W,...", help="One for each; else equal, 1 in all."),
    ] = None,
    density: Annotated[
        float,
        typer.Option(
            "--density",
            metavar="D",
            min=0,
            max=1,
            help="Share of values kept by ties, dare ... (0.5).",
        ),
    ] = 0.5,
    rank: Annotated[
        int | None,
        typer.Option("--rank", metavar="R", min=1, help="Of the outcome, for svd methods."),
    ] = None,
    seed: Seed = 0,
    no_eval: Annotated[
        bool, typer.Option("--no-eval", help="Leave out the evaluation beside the parents.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = None,
) -> None:
    """Make one adapter of several.

    cat is the weighted sum itself, with the ranks added up; svd is the nearest to it of a given
    rank; the others are approximations. How far the outcome is from the weighted sum is printed.
    It is written as an adapter folder with the recipe of the first run among the parents, which
    chat, eval and merge take as they take a run. If that recipe has something to evaluate on
    (--set data.evaluation.path=...), the outcome is measured beside each parent. --json prints
    output, adapters, weights, method, density, rank, seed, norm, error and evaluations.

    \b
    Example:
      qlora adapters combine runs/a runs/b --weights 0.7,0.3 --output runs/a-and-b
    """
    from qlora_cli.export.combine_adapters import combine, read_weights

    report = combine(
        paths,
        output,
        overrides,
        method=method,
        weights=read_weights(weights),
        density=density,
        rank=rank,
        seed=seed,
        measure=not no_eval,
    )
    show(report, as_json, combine_text(report))
