"""Cost of a save."""

from __future__ import annotations

import os
import statistics
import time
from typing import Any

from benchmarks.random_kills.experiment import KEEP, Clock, Experiment


def measure_saves(experiment: Experiment, clock: Clock, repeats: int = 10) -> dict[str, Any]:
    """Measure the size and duration of a save, by itself and within the undisturbed run."""
    import torch

    from qlora_cli.distributed.world import World
    from qlora_cli.models.loading import load_base
    from qlora_cli.recipe.load import load_recipe
    from qlora_cli.runs.checkpoint import load_checkpoint, random_states, save_checkpoint

    os.environ["QLORA_CACHE"] = str(experiment.cache)
    recipe, world = load_recipe(experiment.whole / "recipe.yaml", []).recipe, World()
    model = recipe.adapter.attach(
        load_base(
            recipe.model,
            recipe.quantization,
            world.compute_dtype(recipe.training.precision),
            world.device,
        )
    )
    parts: dict[str, Any] = {
        "model": model,
        "optimizer": recipe.optimizer.build(model.named_parameters(), world.device),
        "scaler": torch.amp.GradScaler(world.device.type, enabled=False),
    }
    newest = experiment.whole / "checkpoints" / f"step-{max(experiment.manifests):08d}"
    state, _ = load_checkpoint(newest, **parts)
    seconds, cpu_seconds = [], []
    for _ in range(repeats):
        state.step += 1
        started, used = time.perf_counter(), time.process_time()
        place = experiment.cache.parent / "saves"
        save_checkpoint(place, state=state, random_states=[random_states()], keep=KEEP, **parts)
        seconds.append(time.perf_counter() - started)
        cpu_seconds.append(time.process_time() - used)
    form = experiment.form
    plain = [s for s in range(1, form.max_steps) if s % form.save_every and s % form.eval_every]
    saved = [s for s in range(1, form.max_steps) if not s % form.save_every and s % form.eval_every]
    return {
        "bytes": sum(file.stat().st_size for file in newest.iterdir()),
        "seconds": [round(pick(seconds), 3) for pick in (min, statistics.median, max)],
        "cpu_seconds": round(statistics.median(cpu_seconds), 3),
        "share_at_one_a_minute": round(statistics.median(seconds) / 60, 5),
        "step_seconds": round(statistics.median(map(clock.turn, plain)), 3),
        "step_and_save_seconds": round(statistics.median(map(clock.turn, saved)), 3),
    }
