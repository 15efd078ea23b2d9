"""Training, from a recipe to a run folder. Read this first, then `loop.py`."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qlora_cli._compat import quiet_libraries
from qlora_cli.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint
from qlora_cli.data import Data
from qlora_cli.data.batches import BatchStream, eval_batches
from qlora_cli.data.sources import Source
from qlora_cli.data.tokenize import Prepared, prepare, read_chat_template
from qlora_cli.loop import fit
from qlora_cli.model.base import learn_to_stop, start_checkpointing
from qlora_cli.model.report import refuse_unquantized, report_trained, report_weights
from qlora_cli.objectives.supervised import TokenLoss, evaluate_loss
from qlora_cli.recipe import Recipe
from qlora_cli.recipe_file import dump_recipe
from qlora_cli.run_folder import RunFolder, environment
from qlora_cli.trackers import open_trackers
from qlora_cli.types import TrainState
from qlora_cli.world import World, set_seed

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

log = logging.getLogger("qlora")


def train(
    recipe: Recipe, *, resume: bool = False, origins: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Run a recipe. The returned record is also in the run folder, as run.json.

    Args:
        resume: go on from the newest whole checkpoint in `output.dir`.
        origins: where each value of the recipe comes from, for the record.

    Raises:
        QloraError: in one of its kinds, with its exit code.
    """
    quiet_libraries()
    settings = recipe.training
    world = World()
    if not world.is_main:
        log.setLevel(logging.ERROR)
    run = RunFolder(Path(recipe.output.dir))
    run.start(resume=resume)
    world.wait()  # a rank that is late must not find the run of its own main process

    # Data first: a bad row is found before a large model is loaded.
    tokenizer = recipe.model.load_tokenizer(read_chat_template(recipe.data.chat_template))
    learnt = read_data("training", recipe.data, recipe.data.train, tokenizer)
    held_out = None
    if recipe.data.evaluation is not None:
        held_out = read_data("evaluation", recipe.data, recipe.data.evaluation, tokenizer)
    batches = BatchStream(
        learnt.examples,
        batch_size=settings.batch_size,
        micro_batch_size=settings.micro_batch_size,
        seed=settings.seed,
        epochs=settings.passes,
        pad_token_id=tokenizer.pad_token_id,
        rank=world.rank,
        world_size=world.size,
    )
    max_steps = settings.max_steps or batches.num_steps

    dtype = world.compute_dtype(settings.precision)
    base = load_base(recipe, dtype, world.device)
    learn_to_stop(base, learnt.stop_token_ids)
    set_seed(settings.seed)  # the same adapter on every rank
    model = recipe.adapter.attach(base)
    set_seed(settings.seed + world.rank)  # but not the same dropout
    trained = report_trained(model)
    log.info(trained.summary())
    if settings.gradient_checkpointing:
        start_checkpointing(base)

    objective = TokenLoss(model, dtype)
    optimizer = recipe.optimizer.build(model.parameters(), world.device)
    scaler = torch.amp.GradScaler(world.device.type, enabled=dtype == torch.float16)
    keeper = Keeper(recipe, run, world, base, model, tokenizer, optimizer, scaler)
    state = keeper.resume(max_steps) if resume else TrainState()
    keeper.record(
        status="training",
        origins=origins,
        max_steps=max_steps,
        trained_weights=trained.trained,
        total_weights=trained.total,
        data={"training": learnt.record(), "evaluation": held_out and held_out.record()},
    )

    def evaluate() -> dict[str, float]:
        if held_out is None:
            return {}
        metrics = measure(objective, held_out, tokenizer, recipe.eval_batch_size, world)
        keeper.keep_best(metrics["eval_loss"], state)
        return metrics

    started = time.monotonic()
    names = recipe.output.trackers if world.is_main else None
    with closing(
        open_trackers(names, run.root, max_steps=max_steps, first_step=state.step)
    ) as tracker:
        fit(
            world.share(objective),
            optimizer,
            lambda step: recipe.schedule.scale(step, max_steps),
            batches,
            settings,
            max_steps=max_steps,
            world=world,
            scaler=scaler,
            state=state,
            evaluate=evaluate,
            save=keeper.checkpoint,
            tracker=tracker,
        )
    keeper.finish(state, seconds=time.monotonic() - started)
    return run.read_record()


def read_data(
    name: str, data: Data, source: Source, tokenizer: PreTrainedTokenizerFast
) -> Prepared:
    """The examples of a source, with a line about them in the log."""
    prepared = prepare(source, tokenizer, max_length=data.max_length, max_lost=data.max_lost)
    log.info("%s data: %s", name, prepared.summary())
    return prepared


def load_base(recipe: Recipe, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The base model as the recipe wants it held, with a line about it in the log."""
    if recipe.model.trust_remote_code:
        log.warning(
            "model.trust_remote_code: running code of %s at %s",
            recipe.model.path,
            recipe.model.revision,
        )
    model = recipe.model.load(recipe.quantization.load_options(dtype), device)
    weights = report_weights(model)
    log.info(weights.summary())
    refuse_unquantized(weights, recipe.quantization.max_unquantized)
    return model


def measure(
    objective: TokenLoss,
    held_out: Prepared,
    tokenizer: PreTrainedTokenizerFast,
    batch_size: int,
    world: World,
) -> dict[str, float]:
    """Loss (mean over all supervised tokens) and perplexity on held-out examples."""
    batches = eval_batches(
        held_out.examples,
        batch_size=batch_size,
        pad_token_id=tokenizer.pad_token_id,
        rank=world.rank,
        world_size=world.size,
    )
    totals = world.sum(evaluate_loss(objective, batches, world.device))
    loss = float(totals[0] / totals[1])
    return {"eval_loss": loss, "eval_perplexity": math.exp(min(loss, 700.0))}


class Keeper:
    """Writes what is kept of a run: its record, checkpoints, the best and the last weights.

    Only the main process writes; the others wait where they must not run ahead.
    """

    def __init__(
        self,
        recipe: Recipe,
        run: RunFolder,
        world: World,
        base: PreTrainedModel,
        model: Any,
        tokenizer: PreTrainedTokenizerFast,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
    ) -> None:
        self._recipe = recipe
        self._run = run
        self._world = world
        self._base = base
        self._model = model
        self._tokenizer = tokenizer
        self._optimizer = optimizer
        self._scaler = scaler

    def resume(self, max_steps: int) -> TrainState:
        """Put the newest whole checkpoint in place.

        Raises:
            TrainingError: there is none, or it is of another model.
        """
        path = newest_checkpoint(self._run.checkpoints)
        state = load_checkpoint(
            path, model=self._model, optimizer=self._optimizer, scaler=self._scaler
        )
        log.info("resuming from %s: step %d of %d", path, state.step, max_steps)
        return state

    def record(self, **values: object) -> None:
        """The recipe as it is run, and facts about the run."""
        if self._world.is_main:
            self._run.recipe.write_text(dump_recipe(self._recipe), encoding="utf-8")
            self._run.update_record(seed=self._recipe.training.seed, **values, **environment())

    def checkpoint(self, state: TrainState) -> None:
        """Save all that is needed to go on from here."""
        if self._world.is_main:
            save_checkpoint(
                self._run.checkpoints,
                model=self._model,
                optimizer=self._optimizer,
                scaler=self._scaler,
                state=state,
                keep=self._recipe.output.keep_checkpoints,
            )
        self._world.wait()

    def keep_best(self, loss: float, state: TrainState) -> None:
        """Keep the weights if no earlier ones had so low a loss."""
        if self._world.is_main and self._run.is_best(loss, state.step):
            self._run.replace("best", self._write_weights)

    def finish(self, state: TrainState, *, seconds: float) -> None:
        """Keep the last weights and close the record."""
        if self._world.is_main:
            self._run.replace("last", self._write_weights)
            self._run.update_record(
                status="finished",
                tokens=state.tokens,
                seconds=round(seconds, 1),
                peak_memory_bytes=self._world.peak_memory_bytes(),
            )
            self._run.write_readme()
        self._world.wait()
        self._world.close()

    def _write_weights(self, folder: Path) -> None:
        self._recipe.adapter.save(self._model, folder)
        self._tokenizer.save_pretrained(folder)
        self._base.generation_config.save_pretrained(folder)
