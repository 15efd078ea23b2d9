"""Compute what the reference model says about the rows of a run, before its first step."""

from __future__ import annotations

import json
import logging

from qlora_cli.common.atomic_files import atomic_file
from qlora_cli.common.cache_folder import cache_folder
from qlora_cli.common.hashing import hash_json
from qlora_cli.common.progress import Progress
from qlora_cli.common.untrusted_files import read_object
from qlora_cli.data.batching.sampler import BatchStream
from qlora_cli.loop.run_data import RunData
from qlora_cli.loop.setup import Setup, evaluation_batches
from qlora_cli.objectives.feedback import FeedbackLoss
from qlora_cli.objectives.preference import PreferenceLoss
from qlora_cli.recipe.schema import Recipe
from qlora_cli.train.warm_start import WarmStart
from qlora_cli.types import Batch

log = logging.getLogger("qlora")


def precompute_reference(
    recipe: Recipe,
    setup: Setup[BatchStream],
    data: RunData,
    warm_start: WarmStart | None,
    *,
    use_cache: bool,
) -> None:
    """Give an objective with a precomputed reference the log-probabilities of all rows.

    The batches are those of the run, so that they are the bits of a live reference.

    Args:
        setup: with the weights before the first step.
        warm_start: where these weights are from.
        use_cache: keep what is computed, and reuse what an equal run has kept.
    """
    if recipe.reference_mode != "precomputed":
        return
    objective, world = setup.objective, setup.world
    assert isinstance(objective, PreferenceLoss | FeedbackLoss)
    reference = objective.reference
    assert reference is not None
    path = (
        cache_folder() / "reference" / f"{_key(recipe, setup, data, warm_start)}-{world.rank}.json"
    )
    if use_cache and path.is_file():
        try:
            reference.use({key: float(value) for key, value in read_object(path).items()})
        except ValueError:
            log.warning("%s: damaged; the reference is computed anew", path)
        else:
            log.info("reference: %s rows, as computed before", f"{len(reference.known):,}")
            return

    def learn(batch: Batch, *, is_training: bool) -> None:
        for part in objective.parts(batch):
            on_device = part.to(world.device)
            reference.precompute(on_device, objective, objective.log_probs, is_training=is_training)

    progress = Progress("reference", setup.max_steps)
    if data.evaluation is not None:
        for batch in evaluation_batches(recipe, data.evaluation, data.tokenizer, world):
            learn(batch, is_training=False)
    for step in range(setup.max_steps):
        for batch in setup.batches.micro_batches(step):
            learn(batch, is_training=True)
        progress.add(1)
    log.info("reference: %s rows computed", f"{len(reference.known):,}")
    if use_cache:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as unfinished:
            unfinished.write_text(json.dumps(reference.known), encoding="utf-8")


def _key(
    recipe: Recipe, setup: Setup[BatchStream], data: RunData, warm_start: WarmStart | None
) -> str:
    """Hash everything that the log-probabilities depend on, to the last bit."""
    sections = ("model", "quantization", "adapter", "data", "objective", "training", "evaluation")
    return hash_json(
        {
            "recipe": recipe.model_dump(mode="json", include=set(sections)),
            "base": dict(data.base),
            "start": None if warm_start is None else warm_start.record()["digest"],
            "rows": dict(data.fingerprint),
            "kernels": setup.kernels,
            "dtype": str(setup.objective.dtype),
            "device": str(setup.world.device.type),
            "ranks": setup.world.size,
        }
    )[:32]
