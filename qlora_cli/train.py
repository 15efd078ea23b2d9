"""Training, from a recipe to a run folder. Read this first, then `loop.py`."""

from __future__ import annotations

import logging
import math
import time
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


def train(recipe: Recipe, *, resume: bool = False) -> dict[str, Any]:
    """Run a recipe. The returned record is also in the run folder, as run.json.

    Args:
        resume: go on from the newest whole checkpoint in `output.dir`.

    Raises:
        QloraError: in one of its kinds, with its exit code.
    """
    quiet_libraries()
    settings = recipe.training
    world = World()
    run = RunFolder(Path(recipe.output.dir))
    run.start(resume=resume)

    # Data first: a bad row is found before a large model is loaded.
    tokenizer = recipe.model.load_tokenizer(read_chat_template(recipe.data.chat_template))
    learnt = read_data("training", recipe.data, recipe.data.train, tokenizer)
    held_out = None
    if recipe.data.evaluation is not None:
        held_out = read_data("evaluation", recipe.data, recipe.data.evaluation, tokenizer)

    dtype = world.compute_dtype(settings.precision)
    model = load_base(recipe, dtype, world.device)
    learn_to_stop(model, learnt.stop_token_ids)
    set_seed(settings.seed)  # the same adapter on every rank
    adapted = recipe.adapter.attach(model)
    set_seed(settings.seed + world.rank)  # but not the same dropout
    trained = report_trained(adapted)
    log.info(trained.summary())
    if settings.gradient_checkpointing:
        start_checkpointing(model)

    objective = TokenLoss(adapted, dtype)
    optimizer = recipe.optimizer.build(adapted.parameters(), world.device)
    scaler = torch.amp.GradScaler(world.device.type, enabled=dtype == torch.float16)
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
    state = TrainState()
    if resume:
        path = newest_checkpoint(run.checkpoints)
        state = load_checkpoint(path, model=adapted, optimizer=optimizer, scaler=scaler)
        log.info("resuming from %s: step %d of %d", path, state.step, max_steps)

    def write_weights(folder: Path) -> None:
        recipe.adapter.save(adapted, folder)
        tokenizer.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)

    def save(state: TrainState) -> None:
        if world.is_main:
            save_checkpoint(
                run.checkpoints,
                model=adapted,
                optimizer=optimizer,
                scaler=scaler,
                state=state,
                keep=recipe.output.keep_checkpoints,
            )
        world.wait()

    def evaluate() -> dict[str, float]:
        if held_out is None:
            return {}
        metrics = measure(objective, held_out, tokenizer, recipe.eval_batch_size, world)
        if world.is_main and run.is_best(metrics["eval_loss"], state.step):
            run.replace("best", write_weights)
        return metrics

    if world.is_main:
        run.recipe.write_text(dump_recipe(recipe), encoding="utf-8")
        run.update_record(
            status="training",
            seed=settings.seed,
            max_steps=max_steps,
            trained_weights=trained.trained,
            total_weights=trained.total,
            data={"training": learnt.record(), "evaluation": held_out and held_out.record()},
            **environment(),
        )
    tracker = open_trackers(
        recipe.output.trackers if world.is_main else None,
        run.root,
        max_steps=max_steps,
        first_step=state.step,
    )
    started = time.monotonic()
    try:
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
            save=save,
            tracker=tracker,
        )
    finally:
        tracker.close()

    if world.is_main:
        run.replace("last", write_weights)
        run.update_record(
            status="finished",
            tokens=state.tokens,
            seconds=round(time.monotonic() - started, 1),
            peak_memory_bytes=world.peak_memory_bytes(),
        )
        run.write_readme()
    world.close()
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
