"""Compare training methods on the same data: one run per cell of a grid, and one report."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from qlora_cli._compat import quiet_libraries
from qlora_cli.common.atomic_files import replace_file
from qlora_cli.common.untrusted_files import refuse_links
from qlora_cli.compare.collect import make_report
from qlora_cli.compare.grid import Cell, CompareRequest, Grid
from qlora_cli.compare.html import comparison_page
from qlora_cli.compare.optuna_search import Search, run_search
from qlora_cli.compare.report import CompareReport
from qlora_cli.compare.store import ResultStore
from qlora_cli.compare.subprocess_runner import run_in_subprocess
from qlora_cli.distributed.world import World
from qlora_cli.errors import Interrupted, RecipeError
from qlora_cli.evaluate.evaluate import choose_tasks
from qlora_cli.runs.run_folder import RunFolder

__all__ = ["CompareRequest", "Search", "compare"]

log = logging.getLogger("qlora")


def compare(request: CompareRequest, folder: Path, search: Search | None = None) -> CompareReport:
    """Train and evaluate every unfinished cell, one after the other.

    A failed cell appears in the report with its reason. The next call tries it again.

    Args:
        folder: folder of the comparison; finished work in it is not repeated.
        search: let Optuna propose the cells, instead of running the whole grid.

    Returns:
        The report, which is also written to comparison.json and comparison.html.

    Raises:
        RecipeError: the recipes cannot be compared, or `folder` holds another comparison.
        Interrupted: the run is saved, and the next call resumes it.
    """
    quiet_libraries()
    if World("cpu").size > 1:
        raise RecipeError(
            "qlora compare is a single process that starts its runs one after the other",
            hint="start it without torchrun",
        )
    grid = Grid(request, folder)
    check = partial(_check, folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecipeError(f"--out: {folder}: {error.strerror}") from error
    refuse_links(folder)
    with RunFolder(folder).locked():
        cells: list[Cell] = []
        try:
            if search is None:
                _run_grid(grid, folder, check, cells)
            else:
                run_search(grid, search, folder, check, cells)
        except Interrupted as why:
            why.kept = "complete cells are kept, and the same command continues"
            raise
        finally:
            report = _write(cells, folder) if cells else None
        assert report is not None, "a grid has at least one cell"
        return report


def _run_grid(grid: Grid, folder: Path, check: Callable[[Cell], None], cells: list[Cell]) -> None:
    found = grid.cells()
    for cell in found:
        check(cell)
    # Said at once: the other cells may take hours.
    for cell in found:
        if cell.error is not None:
            log.warning("%s: left out: %s", cell.name, cell.error)
    cells += found
    for number, cell in enumerate(cells, start=1):
        log.info("cell %d of %d", number, len(cells))
        run_in_subprocess(cell, folder)


def _check(folder: Path, cell: Cell) -> None:
    if cell.recipe is not None:
        ResultStore(folder, cell).refuse_other(cell.recipe)
        choose_tasks(cell.recipe, None, is_tuned=True)  # raises if there is nothing to evaluate


def _write(cells: Sequence[Cell], folder: Path) -> CompareReport:
    """Write the report of all cells so far, as JSON and as a page."""
    report = make_report(cells, folder)
    replace_file(folder / "comparison.json", json.dumps(report.to_json(), indent=2) + "\n")
    replace_file(folder / "comparison.html", comparison_page(report))
    return report
