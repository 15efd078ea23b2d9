"""Search the grid with Optuna, which proposes cells and prunes runs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_cli.compare.collect import find_measure, value_of
from qlora_cli.compare.grid import Axis, Cell, Grid
from qlora_cli.compare.store import ResultStore
from qlora_cli.compare.subprocess_runner import run_in_subprocess
from qlora_cli.errors import RecipeError
from qlora_cli.evaluate.evaluate import choose_tasks
from qlora_cli.recipe.schema import Recipe

if TYPE_CHECKING:
    from optuna import Study, Trial

log = logging.getLogger("qlora")

_CELL, _CUT_SHORT, _SPACE = "cell", "cut short", "space"


@dataclass(frozen=True)
class Search:
    """Number of trials, and the measure to optimize."""

    trials: int
    objective: str


def run_search(
    grid: Grid, search: Search, root: Path, check: Callable[[Cell], None], cells: list[Cell]
) -> None:
    """Run the cells that Optuna proposes, until the study has `search.trials` trials.

    Trials of earlier calls count.

    Args:
        check: raises RecipeError if a cell cannot be run.
        cells: receives the cells, in the order in which they were first proposed.

    Raises:
        RecipeError: Optuna is not installed, or the recipe has no such measure.
        Interrupted: the next call continues the study.
    """
    study = open_study(grid, search, root)
    for known in study.get_trials(deepcopy=False):
        if _CELL in known.user_attrs:
            _add(cells, _propose(grid, _ReplayedTrial(known.params)))
    while _num_trials(study) < search.trials:
        trial = study.ask()
        cell = _propose(grid, trial)
        trial.set_user_attr(_CELL, cell.name)
        check(cell)
        _add(cells, cell)
        log.info("trial %d of %d: %s", _num_trials(study) + 1, search.trials, cell.name)
        store = ResultStore(root, cell)
        run_in_subprocess(cell, root, Pruning(trial, store, f"eval_{search.objective}"))
        _tell_optuna(study, trial, cell, store, search.objective)


def _add(cells: list[Cell], cell: Cell) -> None:
    if cell.name not in {one.name for one in cells}:
        cells.append(cell)


def open_study(grid: Grid, search: Search, root: Path) -> Study:
    """Open the study of a comparison, or create it.

    Raises:
        RecipeError: Optuna is not installed, or the recipe has no such measure.
    """
    try:
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend
    except ImportError as error:
        raise RecipeError(
            "--search needs the package optuna, which is not installed",
            hint='pip install "qlora[search]"',
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    recipe = _any_recipe(grid)
    is_lower = _direction(recipe, search.objective)
    every = recipe.training
    if not (every.eval_every if search.objective == "loss" else every.tasks_every):
        log.warning(
            "no run will be pruned: %s is not measured during training (set training.%s)",
            search.objective,
            "eval_every" if search.objective == "loss" else "tasks_every",
        )
    study = optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(root / "study.log"))),
        study_name=search.objective,
        direction="minimize" if is_lower else "maximize",
        pruner=optuna.pruners.MedianPruner(),
        load_if_exists=True,
    )
    # A continued study must not repeat its first proposals.
    seed = recipe.training.seed + len(study.get_trials(deepcopy=False))
    study.sampler = optuna.samplers.TPESampler(seed=seed)
    _refuse_other_space(study, grid)
    _requeue_interrupted(study)
    return study


def _refuse_other_space(study: Study, grid: Grid) -> None:
    """Raise RecipeError if the search space has changed since the study began."""
    space = [grid.names, [[str(axis), list(axis.values)] for axis in grid.axes]]
    known = study.user_attrs.get(_SPACE, space)
    if known != space:
        raise RecipeError(
            "--search: the study in this folder has other recipes, --methods or --vary",
            hint="use the same ones again, or another folder with --out",
        )
    study.set_user_attr(_SPACE, space)


def _any_recipe(grid: Grid) -> Recipe:
    found = [grid.cell(recipe, method, {}) for recipe, method in grid.choices]
    recipe = next((cell.recipe for cell in found if cell.recipe is not None), None)
    if recipe is None:
        raise RecipeError(f"no recipe of the search is valid: {found[0].error}")
    return recipe


def _direction(recipe: Recipe, objective: str) -> bool:
    """Tell whether lower values of the objective are better."""
    tasks = choose_tasks(recipe, None, is_tuned=True)
    known = {name: one for task in tasks for name, one in task.named_measures()}
    if objective not in known or known[objective].lower_is_better is None:
        able = [name for name, one in known.items() if one.lower_is_better is not None]
        raise RecipeError(f"--objective: no measure {objective}; choose from {', '.join(able)}")
    return bool(find_measure(tasks, objective)[1].lower_is_better)


def _requeue_interrupted(study: Study) -> None:
    """Propose interrupted trials again; their runs resume from what was saved."""
    from optuna.trial import TrialState

    cut = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    before = study.user_attrs.get(_CUT_SHORT, [])
    study.set_user_attr(_CUT_SHORT, [*before, *(trial.number for trial in cut)])
    for trial in cut:
        study.tell(trial.number, state=TrialState.FAIL)
        if trial.params:
            study.enqueue_trial(trial.params)


def _num_trials(study: Study) -> int:
    """Count finished trials, including failed and pruned ones but not interrupted ones."""
    from optuna.trial import TrialState

    over = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
    done = study.get_trials(deepcopy=False, states=over)
    return len(done) - len(study.user_attrs.get(_CUT_SHORT, []))


def _tell_optuna(
    study: Study, trial: Trial, cell: Cell, store: ResultStore, objective: str
) -> None:
    from optuna.trial import TrialState

    failure = store.failure()
    if failure and failure.get("is_pruned"):
        study.tell(trial, state=TrialState.PRUNED)
    elif (value := value_of(cell, store, objective)) is None or failure:
        study.tell(trial, state=TrialState.FAIL)
    else:
        study.tell(trial, value)


def _propose(grid: Grid, trial: Any) -> Cell:
    """Let a trial choose recipe and method first, then the values of their keys."""
    names = dict(zip(grid.names, grid.choices, strict=True))
    chosen = trial.suggest_categorical("run", list(names)) if len(names) > 1 else next(iter(names))
    recipe, method = names[chosen]
    settings = {axis.key: _value(trial, axis) for axis in grid.axes_of(recipe, method)}
    return grid.cell(recipe, method, settings)


def _value(trial: Any, axis: Axis) -> str:
    if axis.range is None:
        value: str = trial.suggest_categorical(str(axis), axis.values)
        return value
    low, high = axis.range
    if axis.is_whole:
        return str(trial.suggest_int(str(axis), int(low), int(high), log=low > 0))
    # Rounded, because the value is also part of the cell's name and both must agree.
    return f"{trial.suggest_float(str(axis), low, high, log=low > 0):.3g}"


@dataclass
class _ReplayedTrial:
    """A trial of an earlier call, which repeats its choices."""

    params: dict[str, Any]

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        return self.params[name]

    def suggest_int(self, name: str, low: int, high: int, *, log: bool) -> Any:
        return self.params[name]

    suggest_float = suggest_int


@dataclass
class Pruning:
    """Report the evaluations of a run to its trial, and ask whether to prune the run."""

    trial: Trial
    store: ResultStore
    key: str
    """Key of the measure in metrics.jsonl."""
    _reported: set[int] = field(default_factory=set)

    def __call__(self) -> bool:
        for row in self._evaluations():
            if row["step"] not in self._reported:
                self._reported.add(row["step"])
                self.trial.report(row[self.key], row["step"])
        # A run that has finished training is evaluated, not pruned.
        return bool(self._reported) and self._is_training() and self.trial.should_prune()

    def _is_training(self) -> bool:
        return self.store.record().get("status") == "training"

    def _evaluations(self) -> Iterator[dict[str, Any]]:
        # Step 0 is the untrained model, which is the same for all.
        return (r for r in self.store.metrics() if r["step"] and r.get(self.key) is not None)
