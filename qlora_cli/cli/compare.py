"""The compare command: train several methods and compare them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qlora_cli.cli.options import Json, Overrides, Quiet, show, user_path
from qlora_cli.errors import EXIT_FAILED_CELLS


def compare(
    recipes: Annotated[
        list[Path],
        typer.Argument(parser=user_path, metavar="RECIPE...", help="One or more recipes."),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            parser=user_path,
            metavar="DIR",
            help="Folder of the comparison, new or to be continued.",
        ),
    ],
    overrides: Overrides,
    vary: Annotated[
        list[str],
        typer.Option(
            "--vary",
            metavar="[METHOD:]KEY=VALUE,...",
            default_factory=list,
            show_default=False,
            help="Try these values of a key, for one method or for all that have it (repeatable).",
        ),
    ],
    learning_rates: Annotated[
        list[str],
        typer.Option(
            "--learning-rate",
            metavar="METHOD=NUMBER",
            default_factory=list,
            show_default=False,
            help="Learning rate of one method; the others use the recipe's (repeatable).",
        ),
    ],
    methods: Annotated[
        str | None,
        typer.Option(
            "--methods",
            metavar="NAME,...",
            help="Adapter types (unquantized), quantization types (with LoRA), or qlora.",
        ),
    ] = None,
    search: Annotated[
        int | None,
        typer.Option(
            "--search",
            metavar="N",
            min=1,
            help="Let Optuna choose N cells instead of training all.",
        ),
    ] = None,
    objective: Annotated[
        str | None,
        typer.Option(
            "--objective",
            metavar="MEASURE",
            help="Measure that --search optimizes: loss, or a task.",
        ),
    ] = None,
    generation: Annotated[
        bool,
        typer.Option(
            "--generation/--no-generation",
            help="Merge each run; measure the generation speed of base, adapter and merged model.",
        ),
    ] = True,
    as_json: Json = False,
    quiet: Quiet = None,
) -> None:
    """Train several methods on the same data and compare them.

    They run one after the other, with the same seed and budget. Each cell is a run in DIR/runs. Run
    the command again to continue: complete cells are kept. A cell that fails is listed with its
    reason, the exit code is 8, and the next call retries it. --set changes the cells whose sections
    have the key. Ranges (1e-5..1e-2) need --search. --json prints the content of
    DIR/comparison.json.

    \b
    Example:
      qlora compare recipe.yaml --methods full,lora,qlora,int8 --out runs/compared \\
        --learning-rate full=2e-5
      qlora compare recipe.yaml --methods lora --vary adapter.r=4,16,64 --out runs/ranks \\
        --vary 'adapter.target_modules=[q_proj,v_proj],all-linear'
      qlora compare recipe.yaml --vary optimizer.learning_rate=1e-5..1e-2 --search 20 \\
        --objective loss --out runs/searched
    """
    if (search is None) != (objective is None):
        raise typer.BadParameter("--search and --objective need each other: give both or neither")
    from qlora_cli.compare.compare import CompareRequest, Search, compare
    from qlora_cli.compare.text import comparison_text

    names = [name.strip() for name in methods.split(",")] if methods else []
    asked = CompareRequest(recipes, names, vary, learning_rates, overrides, generation)
    how = Search(search, objective) if search and objective else None
    report = compare(asked, out, how)
    show(report.to_json(), as_json, comparison_text(report))
    if any(cell.status == "failed" for cell in report.cells):
        raise typer.Exit(EXIT_FAILED_CELLS)
