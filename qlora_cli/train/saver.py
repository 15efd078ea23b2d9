"""Save and restore a run: record, checkpoints, best and last weights."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from qlora_cli.common.atomic_files import replace_file
from qlora_cli.distributed.world import set_seed
from qlora_cli.errors import Interrupted, TrainingError
from qlora_cli.loop.setup import Batches, Setup
from qlora_cli.models.tokenizer_files import save_generation_config, save_tokenizer
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
from qlora_cli.train.disk_space import DiskBudget, count_saves
from qlora_cli.train.run_time import RunTime
from qlora_cli.types import TrainState

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

log = logging.getLogger("qlora")


class CheckpointManager:
    """Save and restore a run. Only the main process writes.

    The others wait for it where they must not run ahead.
    """

    def __init__(
        self,
        run: RunFolder,
        setup: Setup[Batches],
        recipe: Recipe,
        tokenizer: PreTrainedTokenizerFast,
    ) -> None:
        self._run = run
        self._setup = setup
        self._recipe = recipe
        self._tokenizer = tokenizer
        self._world = setup.world
        self._best_by = recipe.evaluation.best_by
        self._lower_is_better = bool(recipe.measures[self._best_by].lower_is_better)
        self._saved_step = 0
        self._time = RunTime(run)

    def require_disk_space(self, *, has_best: bool) -> None:
        """Raise TrainingError if the disk has no room for what the run will keep."""
        num_trained = self._setup.trained.trained
        room = DiskBudget(
            # Trained weights are float32, whatever the step computes in.
            weights=4 * num_trained,
            state=self._recipe.optimizer.state_bytes * num_trained,
            keep=self._recipe.output.keep_checkpoints,
            saves=count_saves(self._setup.max_steps, self._recipe.training.save_every),
            has_best=has_best,
        )
        room.require(self._run.available_bytes(), self._run.root)

    def start_clock(self, state: TrainState) -> None:
        """Measure the training time of the run from here on."""
        self._time.start(state.step)

    def resume(self, which: str, changes: Mapping[str, object]) -> TrainState:
        """Load a checkpoint: the newest complete one ("auto"), or one by its step or path.

        Args:
            changes: what differs from the start of the run; it is recorded.

        Raises:
            TrainingError: there is no such checkpoint, it belongs to another model, or its step is
                beyond `max_steps`.
        """
        path = find_checkpoint(self._run.checkpoints, which)
        state, is_same_world = self._load(path)
        max_steps = self._setup.max_steps
        if state.step > max_steps:
            raise TrainingError(f"--resume: {path} is beyond the last step, {max_steps}")
        if not is_same_world:
            log.warning("saved with another number of processes: dropout draws other numbers")
            set_seed(self._recipe.training.seed + self._world.rank + state.step)
        why = "the newest complete one" if which == "auto" else "requested"
        log.info("resuming from %s (%s): step %d of %d", path, why, state.step, max_steps)
        if self._world.is_main:
            before = self._run.read_record().get("resumed", [])
            self._run.update_record(resumed=[*before, {"step": state.step, "changes": changes}])
        return state

    def go_back(self, state: TrainState) -> None:
        """Load the newest checkpoint, and its state into `state`.

        Raises:
            TrainingError: there is no checkpoint.
        """
        path = newest_checkpoint(self._run.checkpoints)
        saved, _ = self._load(path)
        for field in dataclasses.fields(saved):
            setattr(state, field.name, getattr(saved, field.name))

    def record(self, **values: object) -> None:
        """Write the resolved recipe, and facts about the run."""
        if self._world.is_main:
            # Written first: a folder with other files and no record would be refused.
            self._run.update_record(
                recipe=self._recipe.model_dump(mode="json"),
                seed=self._recipe.training.seed,
                processes=self._world.size,
                **values,
                **environment(),
            )
            # Written atomically: it may be the user's only copy of the recipe.
            replace_file(self._run.recipe, dump_recipe(self._recipe))

    def note(self, **values: object) -> None:
        """Add facts to the record."""
        if self._world.is_main:
            self._run.update_record(**values)

    def checkpoint(self, state: TrainState) -> None:
        """Save everything that is needed to resume here."""
        self._save(state, self._world.gather(random_states()))
        self._world.wait()

    @contextmanager
    def rescuing(self, state: TrainState) -> Iterator[None]:
        """Save the steps since the last checkpoint if an error in the block ends the run.

        The other processes may be anywhere by then, so this one does not wait for them. With
        several processes dropout therefore draws other numbers after a resume.
        """
        try:
            yield
        except Exception:
            # As in the loop: a possibly bad state does not replace a good one.
            is_sound = state.bad_steps == state.high_steps == 0
            if is_sound and state.step > self._saved_step:
                self._save(state, [random_states()])
            raise

    def _save(self, state: TrainState, states: list[dict[str, Any]]) -> None:
        if self._world.is_main:
            save_checkpoint(
                self._run.checkpoints,
                model=self._setup.model,
                optimizer=self._setup.optimizer,
                scaler=self._setup.scaler,
                state=state,
                random_states=states,
                keep=self._recipe.output.keep_checkpoints,
            )
            with _written("record", self._run.root):
                self._time.note(state.step, self._recipe.output.keep_checkpoints)
        self._saved_step = state.step

    def keep_best(self, metrics: dict[str, float], state: TrainState) -> None:
        """Keep the weights if they are the best so far. Untrained weights do not count.

        Args:
            metrics: of an evaluation; the one of `evaluation.best_by` may be missing.
        """
        value = metrics.get(f"eval_{self._best_by}")
        if value is None:
            return
        found = {"by": self._best_by, "value": value}
        if not state.is_trained:
            if self._world.is_main:
                self._run.update_record(untrained=found)
            return
        if state.best_value is not None and not self._is_better(value, state.best_value):
            return
        if self._world.is_main:
            with _written("best weights", self._run.root):
                self._run.update_record(best={"step": state.step, **found, **metrics})
                self._run.replace("best", self._write_weights)
        # Set last: a run that is killed above and resumed must find these weights better again.
        state.best_step, state.best_value = state.step, value

    def _load(self, path: Path) -> tuple[TrainState, bool]:
        state, is_same_world = load_checkpoint(
            path,
            model=self._setup.model,
            optimizer=self._setup.optimizer,
            scaler=self._setup.scaler,
            rank=self._world.rank,
            world_size=self._world.size,
        )
        self._saved_step = state.step
        return state, is_same_world

    def _write_weights(self, folder: Path) -> None:
        """Write the trained weights and their tokenizer."""
        with self._recipe.optimizer.evaluation_weights(self._setup.optimizer):
            self._recipe.adapter.save(self._setup.model, folder)
        base = self._recipe.model.locate()
        save_tokenizer(self._tokenizer, base, folder)
        save_generation_config(self._setup.base, base, folder)

    def _is_better(self, value: float, than: float) -> bool:
        return value < than if self._lower_is_better else value > than

    def finish(self, state: TrainState) -> None:
        """Write the last weights and complete the record.

        Raises:
            TrainingError: they are not finite, or no step was applied.
        """
        if not state.is_trained:
            self.note(status="failed", steps=state.step, steps_not_applied=state.not_applied)
            raise TrainingError(
                f"{self._run.root}: no step was applied, of {state.step}: the loss or the gradient "
                "was never finite. The weights are untrained and were not written",
                hint="look at the rows named above; then start again in another output.dir with a "
                "lower optimizer.learning_rate, or with training.precision bf16 or fp32 in place "
                "of fp16",
            )
        if self._world.is_main:
            refuse_non_finite(self._setup.model, state.step)
            with _written("last weights", self._run.root):
                self._run.replace("last", self._write_weights)
            # An extended run adds to this time, with the last evaluation.
            self._time.note(state.step, self._recipe.output.keep_checkpoints)
            self._run.update_record(
                status="finished",
                steps=state.step,
                steps_not_applied=state.not_applied,
                first_loss=state.first_loss,
                last_loss=state.last_loss,
                tokens=state.tokens,
                seconds=round(self._time.seconds, 1),
                **self._world.peak_memory(),
            )
            self._run.write_readme()
            write_cards(self._run)
            # A kill may have ended the last save before it removed older checkpoints.
            keep = self._recipe.output.keep_checkpoints
            drop_old_checkpoints(self._run.checkpoints, state.step, keep)
            self._warn_if_untrained_is_best()
        self._world.wait()
        self._world.close()

    def log_interruption(self, state: TrainState, why: Interrupted) -> None:
        """Log what was saved of a run that was interrupted after `state.step` steps."""
        then = "no step was completed"
        if state.step:
            then = "it is saved, and --resume auto continues from here"
        log.warning("stopped after step %d (%s): %s", state.step, why, then)
        why.kept = None

    def _warn_if_untrained_is_best(self) -> None:
        record = self._run.read_record()
        if "best" not in record or "untrained" not in record:
            return
        best, untrained = record["best"]["value"], record["untrained"]["value"]
        if not self._is_better(best, untrained):
            log.warning(
                "%s on the evaluation rows was never better than that of the untrained model "
                "(%.4f; the best since is %.4f): training did not improve it. Try a lower "
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
            hint="free some space (or check the folder's permissions), then continue with "
            "--resume auto",
        ) from error
