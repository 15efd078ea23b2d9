"""Methods beside each other on the same data: a run for each cell of a grid, and one report."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from qlora_cli._compat import quiet_libraries
from qlora_cli.common.atomic_files import replace_file
from qlora_cli.common.untrusted_files import refuse_links
from qlora_cli.compare.grid import Cell, CompareRequest, Grid
from qlora_cli.compare.html import comparison_page
from qlora_cli.compare.optuna_search import Search, run_search
from qlora_cli.compare.report import make_report
from qlora_cli.compare.store import ResultStore
from qlora_cli.compare.subprocess_runner import run_in_subprocess
from qlora_cli.distributed.world import World
from qlora_cli.errors import RecipeError
from qlora_cli.evaluate.evaluate import choose_tasks
from qlora_cli.runs.run_folder import RunFolder

__all__ = ["CompareRequest", "Search", "compare"]

log = logging.getLogger("qlora")


def compare(request: CompareRequest, folder: Path, search: Search | None = None) -> dict[str, Any]:
    """Train and measure every cell that is not done yet, one after the other.

    A cell that fails is a row with its reason, and is tried again by the next call.

    Args:
        folder: of the comparison; what is done in it already is not done again.
        search: let Optuna propose the cells, in place of the whole grid.

    Returns:
        See `make_report`; it is also in comparison.json, and in comparison.html for people.

    Raises:
        RecipeError: what is asked for cannot be compared, or `folder` holds another comparison.
        Interrupted: what was learnt is saved, and the next call goes on.
    """
    quiet_libraries()
    if World().size > 1:
        raise RecipeError(
            "qlora compare is one process, which starts its runs one after the other",
            hint="without torchrun",
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
        finally:
            report = _write(cells, folder) if cells else {}
        return report


def _run_grid(grid: Grid, folder: Path, check: Callable[[Cell], None], cells: list[Cell]) -> None:
    found = grid.cells()
    for cell in found:
        check(cell)
    cells += found
    for number, cell in enumerate(cells, start=1):
        log.info("cell %d of %d", number, len(cells))
        run_in_subprocess(cell, folder)


def _check(folder: Path, cell: Cell) -> None:
    if cell.recipe is not None:
        ResultStore(folder, cell).refuse_other(cell.recipe)
        choose_tasks(cell.recipe, None, is_tuned=True)  # raises where there is nothing to ask


def _write(cells: Sequence[Cell], folder: Path) -> dict[str, Any]:
    """The report of what there is, as JSON and as a page."""
    report = make_report(cells, folder)
    replace_file(folder / "comparison.json", json.dumps(report, indent=2) + "\n")
    replace_file(folder / "comparison.html", comparison_page(report))
    return report
