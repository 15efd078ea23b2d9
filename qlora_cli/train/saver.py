"""What is kept of a run while it goes on: record, checkpoints, best and last weights."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from qlora_cli.common.atomic_files import replace_file
from qlora_cli.distributed.world import World, set_seed
from qlora_cli.errors import Interrupted, TrainingError
from qlora_cli.recipe.load import dump_recipe
from qlora_cli.recipe.schema import Recipe
from qlora_cli.runs.checkpoint import (
    drop_old_checkpoints,
    find_checkpoint,
    load_checkpoint,
    newest_checkpoint,
    random_states,
    refuse_non_finite,
    save_checkpoint,
)
from qlora_cli.runs.model_card import write_cards
from qlora_cli.runs.run_folder import RunFolder, environment
from qlora_cli.train.disk_space import DiskBudget
from qlora_cli.types import TrainState

log = logging.getLogger("qlora")


class CheckpointManager:
    """Keeps a run. Only the main process writes; the others wait where they must not run ahead.

    Args:
        write_weights: writes the trained weights, with their tokenizer, into a folder.
        best_by: name of the measure that decides which weights are the best.
    """

    def __init__(
        self,
        run: RunFolder,
        world: World,
        model: nn.Module,
        optimizer: Optimizer,
        scaler: GradScaler,
        *,
        keep_checkpoints: int,
        write_weights: Callable[[Path], None],
        best_by: str,
        lower_is_better: bool,
    ) -> None:
        self._run = run
        self._world = world
        self._model = model
        self._optimizer = optimizer
        self._scaler = scaler
        self._keep_checkpoints = keep_checkpoints
        self._write_weights = write_weights
        self._best_by = best_by
        self._lower_is_better = lower_is_better
        self._saved_step = 0

    def require_disk_space(
        self, *, num_trained: int, state_bytes: int, saves: int, has_best: bool
    ) -> None:
        """Raises TrainingError if the disk has no room for what will be kept.

        Args:
            num_trained: trained weights.
            state_bytes: of the optimizer, for each of them.
            saves: checkpoints that will be written.
        """
        room = DiskBudget(
            # They are float32, whatever is computed in.
            weights=4 * num_trained,
            state=state_bytes * num_trained,
            keep=self._keep_checkpoints,
            saves=saves,
            has_best=has_best,
        )
        room.require(self._run.room(), self._run.root)

    def resume(
        self, which: str, max_steps: int, seed: int, changes: Mapping[str, object]
    ) -> TrainState:
        """Put a checkpoint in place: "auto" is the newest that is whole, or its step, or its path.

        Args:
            changes: what is not as it was when the run was started; it is recorded.

        Raises:
            TrainingError: there is none, it is of another model, or of a step beyond `max_steps`.
        """
        path = find_checkpoint(self._run.checkpoints, which)
        state, is_same_world = self._load(path)
        if state.step > max_steps:
            raise TrainingError(f"--resume: {path} is beyond the last step, {max_steps}")
        if not is_same_world:
            log.warning("saved on another number of processes: dropout is drawn anew")
            set_seed(seed + self._world.rank + state.step)
        why = "the newest that is whole" if which == "auto" else "as it was asked"
        log.info("resuming from %s (%s): step %d of %d", path, why, state.step, max_steps)
        if self._world.is_main:
            before = self._run.read_record().get("resumed", [])
            self._run.update_record(resumed=[*before, {"step": state.step, "changes": changes}])
        return state

    def go_back(self, state: TrainState) -> None:
        """Put the newest checkpoint in place, and what it says into `state`.

        Raises:
            TrainingError: there is none.
        """
        path = newest_checkpoint(self._run.checkpoints)
        saved, _ = self._load(path)
        for field in dataclasses.fields(saved):
            setattr(state, field.name, getattr(saved, field.name))

    def record(self, recipe: Recipe, **values: object) -> None:
        """The recipe as it is run, and facts about the run."""
        if self._world.is_main:
            # First: a folder without a record is no run, and may hold nothing else.
            self._run.update_record(
                recipe=recipe.model_dump(mode="json"),
                seed=recipe.training.seed,
                processes=self._world.size,
                **values,
                **environment(),
            )
            # Whole or not at all: it may be the only recipe that the user has.
            replace_file(self._run.recipe, dump_recipe(recipe))

    def note(self, **values: object) -> None:
        """More facts about the run."""
        if self._world.is_main:
            self._run.update_record(**values)

    def checkpoint(self, state: TrainState) -> None:
        """Save all that is needed to go on from here."""
        self._save(state, self._world.gather(random_states()))
        self._world.wait()

    @contextmanager
    def rescuing(self, state: TrainState) -> Iterator[None]:
        """If an error in here is about to end the run, save what no checkpoint has yet.

        The other processes may be anywhere by then, so nobody waits for them, and where there are
        some, dropout will be drawn anew.
        """
        try:
            yield
        except Exception:
            # As in the loop: what may be bad takes the place of nothing that is good.
            is_sound = state.bad_steps == state.high_steps == 0
            if is_sound and state.step > self._saved_step:
                self._save(state, [random_states()])
            raise

    def _save(self, state: TrainState, states: list[dict[str, Any]]) -> None:
        if self._world.is_main:
            save_checkpoint(
                self._run.checkpoints,
                model=self._model,
                optimizer=self._optimizer,
                scaler=self._scaler,
                state=state,
                random_states=states,
                keep=self._keep_checkpoints,
            )
        self._saved_step = state.step

    def keep_best(self, metrics: dict[str, float], state: TrainState) -> None:
        """Keep the weights if no earlier ones were so good. The untrained start is none.

        Args:
            metrics: `eval_loss` and its like; what decides may not be among them.
        """
        value = metrics.get(f"eval_{self._best_by}")
        if value is None:
            return
        found = {"by": self._best_by, "value": value}
        if state.step == 0:
            if self._world.is_main:
                self._run.update_record(untrained=found)
            return
        if state.best_value is not None and not self._is_better(value, state.best_value):
            return
        if self._world.is_main:
            with _written("best weights", self._run.root):
                self._run.update_record(best={"step": state.step, **found, **metrics})
                self._run.replace("best", self._write_weights)
        # Last: a run that ends in here and goes on has to find them better again.
        state.best_step, state.best_value = state.step, value

    def _load(self, path: Path) -> tuple[TrainState, bool]:
        state, is_same_world = load_checkpoint(
            path,
            model=self._model,
            optimizer=self._optimizer,
            scaler=self._scaler,
            rank=self._world.rank,
            world_size=self._world.size,
        )
        self._saved_step = state.step
        return state, is_same_world

    def _is_better(self, value: float, than: float) -> bool:
        return value < than if self._lower_is_better else value > than

    def finish(self, state: TrainState, *, seconds: float) -> None:
        """Keep the last weights and close the record.

        Raises:
            TrainingError: they are not finite.
        """
        if self._world.is_main:
            refuse_non_finite(self._model, state.step)
            with _written("last weights", self._run.root):
                self._run.replace("last", self._write_weights)
            self._run.update_record(
                status="finished",
                steps=state.step,
                tokens=state.tokens,
                seconds=round(seconds, 1),
                peak_memory_bytes=self._world.peak_memory_bytes(),
            )
            self._run.write_readme()
            write_cards(self._run)
            # The last save may have been cut short after its checkpoint was there.
            drop_old_checkpoints(self._run.checkpoints, state.step, self._keep_checkpoints)
            self._warn_if_nothing_was_learnt()
        self._world.wait()
        self._world.close()

    def interrupted(self, state: TrainState, why: Interrupted) -> None:
        """Say what is left of a run that was asked to end after `state.step` steps."""
        then = "nothing had been learnt yet"
        if state.step:
            then = "all that was learnt is saved, and --resume auto goes on from it"
        log.warning("stopped after step %d (%s): %s", state.step, why, then)

    def _warn_if_nothing_was_learnt(self) -> None:
        record = self._run.read_record()
        if "best" not in record or "untrained" not in record:
            return
        best, untrained = record["best"]["value"], record["untrained"]["value"]
        if not self._is_better(best, untrained):
            log.warning(
                "%s on held-out rows was never better than that of the untrained model (%.4f; the "
                "best since is %.4f): the result is no better than what it began with. Try a lower "
                "optimizer.learning_rate",
                self._best_by,
                untrained,
                best,
            )


@contextmanager
def _written(what: str, folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise TrainingError(
            f"the {what} cannot be written into {folder}: {error}; the checkpoints are untouched",
            hint="make room (or see who may write there), then go on with --resume auto",
        ) from error
