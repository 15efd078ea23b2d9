"""The command that compares methods."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qlora_cli.cli.options import Json, Overrides, Quiet, show
from qlora_cli.errors import EXIT_FAILED_CELLS


def compare(
    recipes: Annotated[
        list[Path], typer.Argument(metavar="RECIPE...", help="One recipe, or several.")
    ],
    out: Annotated[
        Path,
        typer.Option("--out", metavar="DIR", help="Folder of the comparison; it goes on there."),
    ],
    overrides: Overrides,
    vary: Annotated[
        list[str],
        typer.Option(
            "--vary",
            metavar="[METHOD:]KEY=VALUE,...",
            default_factory=list,
            show_default=False,
            help="A key and its values, for all methods that have the key or for one (can be given "
            "more than once).",
        ),
    ],
    learning_rates: Annotated[
        list[str],
        typer.Option(
            "--learning-rate",
            metavar="METHOD=NUMBER",
            default_factory=list,
            show_default=False,
            help="The learning rate of one method; the others have the recipe's.",
        ),
    ],
    methods: Annotated[
        str | None,
        typer.Option(
            "--methods",
            metavar="NAME,...",
            help="Types of adapter (unquantized) or of quantization (with LoRA), or qlora.",
        ),
    ] = None,
    search: Annotated[
        int | None,
        typer.Option(
            "--search", metavar="N", min=1, help="Let Optuna choose N cells, in place of all."
        ),
    ] = None,
    objective: Annotated[
        str | None,
        typer.Option("--objective", metavar="MEASURE", help="What --search goes by: loss, a task."),
    ] = None,
    generation: Annotated[
        bool,
        typer.Option(
            "--generation/--no-generation",
            help="Merge each, and measure how quickly base, adapted and merged model answer.",
        ),
    ] = True,
    as_json: Json = False,
    quiet: Quiet = None,
) -> None:
    """Train methods on the same data, seed and budget, one after the other, and compare them.

    Each cell is a run of its own in DIR/runs. What is done is not done again: called once more, the
    comparison goes on. A cell that fails is a row with its reason; the exit code is 8 then, and
    the next call tries it again. --set reaches the cells whose sections have the key. A range
    (1e-5..1e-2) is for --search. --json prints what is also in DIR/comparison.json.

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
        raise typer.BadParameter("--search and --objective go together")
    from qlora_cli.compare.compare import CompareRequest, Search, compare
    from qlora_cli.compare.text import comparison_text

    names = [name.strip() for name in methods.split(",")] if methods else []
    asked = CompareRequest(recipes, names, vary, learning_rates, overrides, generation)
    how = Search(search, objective) if search and objective else None
    report = compare(asked, out, how)
    show(report, as_json, comparison_text(report))
    if any(cell["status"] == "failed" for cell in report["cells"]):
        raise typer.Exit(EXIT_FAILED_CELLS)
