"""Run one cell in its own process, which isolates its memory and its failures."""

from __future__ import annotations

import logging
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from qlora_cli._compat import quiet_libraries
from qlora_cli.common.atomic_files import remove_folder
from qlora_cli.common.secrets import MaskedFormatter, masked
from qlora_cli.compare.grid import Cell
from qlora_cli.compare.latency import measure_latency
from qlora_cli.compare.report import CellGeneration, Latency
from qlora_cli.compare.store import ResultStore
from qlora_cli.distributed.world import World
from qlora_cli.errors import Interrupted, QloraError
from qlora_cli.evaluate.evaluate import choose_tasks, evaluate_model
from qlora_cli.evaluate.target import find_model
from qlora_cli.export.merge import merge
from qlora_cli.models.loading import compute_dtype, load_base
from qlora_cli.models.tokenizer import load_tokenizer
from qlora_cli.plan.plan import plan
from qlora_cli.recipe.schema import Recipe
from qlora_cli.runs.run_folder import RunFolder
from qlora_cli.train.train import train

log = logging.getLogger("qlora")


def run_worker(cell: Cell, root: Path, level: int) -> None:
    """Train and evaluate a cell, skipping finished parts. Save the reason of a failure.

    Args:
        root: folder of the comparison.
        level: log level.
    """
    os.setpgrp()  # the parent receives signals of the terminal and forwards them
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    handler = logging.StreamHandler()
    handler.setFormatter(MaskedFormatter())
    log.addHandler(handler)
    log.setLevel(level)
    quiet_libraries()
    store = ResultStore(root, cell)
    try:
        run_cell(cell, store)
        store.save_failure(None)
    except Interrupted as ended:
        sys.exit(ended.exit_code)
    except QloraError as error:
        store.save_failure(
            {"error": masked(str(error)), "hint": error.hint, "exit_code": error.exit_code}
        )
        sys.exit(error.exit_code)
    # Any error fails this cell only: the report has to say why.
    except Exception as error:
        message = masked(f"{type(error).__name__}: {error}")
        store.save_failure({"error": message, "hint": None, "exit_code": 1})
        raise  # an internal error: its traceback belongs in a bug report


def run_cell(cell: Cell, store: ResultStore) -> None:
    """Run a cell in this process.

    Raises:
        QloraError: training or evaluation failed.
        Interrupted: the run is saved.
    """
    assert cell.recipe is not None
    _train(cell.recipe, dict(cell.origins), store)
    if store.answers() is None:
        _evaluate(cell.recipe, store)
    if not store.is_done:
        store.save_measurements(_measure(cell.recipe, store.run, with_latency=cell.with_latency))


def _train(recipe: Recipe, origins: dict[str, str], store: ResultStore) -> None:
    run = store.run
    if store.record().get("status") == "finished":
        return
    if any(run.checkpoints.glob("step-*")):
        train(recipe, resume="auto", origins=origins)
        return
    if run.root.exists():
        with run.locked():  # raises if another process trains in it
            pass
        remove_folder(run.root)  # interrupted before its first checkpoint
    train(recipe, origins=origins)


def _evaluate(recipe: Recipe, store: ResultStore) -> None:
    """Evaluate the tuned model, and its base unless another cell has done so."""
    evaluated = find_model(store.run.root, (), "last", None)
    tasks = choose_tasks(recipe, None, is_tuned=True)
    alone = store.has_base
    for name, answers in evaluate_model(
        evaluated, recipe, tasks, World(recipe.device), alone=alone
    ):
        store.save_outcomes(answers, of_base=name == "base" and not alone)


def _measure(recipe: Recipe, run: RunFolder, *, with_latency: bool) -> dict[str, Any]:
    weights = run.weights("last")
    generates = with_latency and recipe.objective.head is None
    return {
        "plan": _plan(recipe),
        "generation": _measure_generation(recipe, run).to_json() if generates else None,
        "weights_bytes": sum(file.stat().st_size for file in weights.glob("*.safetensors")),
        "run_bytes": sum(f.stat().st_size for f in run.root.rglob("*") if f.is_file()),
    }


def _plan(recipe: Recipe) -> dict[str, Any]:
    """Return the planned memory, or the reason why there is no plan."""
    try:
        report = plan(recipe, device=World(recipe.device).device.type)
    except QloraError as error:
        return {"error": masked(str(error))}
    peak = report.peak
    return {
        "tensor_bytes": peak.bytes,
        "process_bytes": [report.process.low, report.process.high],
        "stage": peak.stage,
        "kinds": dict(peak.kinds),
    }


def _measure_generation(recipe: Recipe, run: RunFolder) -> CellGeneration:
    """Measure the generation speed of base, adapted and merged model, or say why it failed."""
    world = World(recipe.device)
    dtype = compute_dtype(recipe.quantization, recipe.training.precision, world)
    weights = run.weights("last")
    tokenizer = load_tokenizer(weights, trust_remote_code=recipe.model.trust_remote_code)
    # The same for all three forms, so that they generate as many tokens.
    context = recipe.model.read_context(recipe.adapter.virtual_tokens)

    def speed(model: Any) -> Latency:
        return measure_latency(model, tokenizer, dtype=dtype, device=world.device, context=context)

    model = load_base(recipe.model, recipe.quantization, dtype, world.device)
    base = speed(model)
    tuned = speed(recipe.adapter.load(model, weights).eval())
    del model
    merged = run.root.parent / f".{run.root.name}.merged"
    shutil.rmtree(merged, ignore_errors=True)
    try:
        merge(run.root, merged, weights="last", with_logits=False)
        merged_recipe = _plain(recipe, merged)
        of_merged = speed(
            load_base(merged_recipe.model, merged_recipe.quantization, dtype, world.device)
        )
    except QloraError as error:
        of_merged = Latency(error=masked(str(error)))
    finally:
        shutil.rmtree(merged, ignore_errors=True)
    return CellGeneration(base, tuned, of_merged)


def _plain(recipe: Recipe, model: Path) -> Recipe:
    """Return the recipe of a merged model, which needs no adapter and no quantization."""
    document = recipe.model_dump(mode="json")
    document["model"] |= {"path": str(model), "revision": None}
    return Recipe.model_validate({**document, "quantization": {"type": "none"}})


def _exit_with_parent() -> None:
    """Stop the run, saved, when the parent process ends."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
