"""Compare the predictions of `qlora plan` with real steps on this machine's CPU.

    python -m benchmarks.plan_validation

Each run of the grid is a process of its own: it loads the model, then makes the steps of
`qlora_cli/plan/dry_run.py` (the train step, the optimizer and the evaluation of `qlora train`) with
real tensors, which are counted as they are created, while a thread samples the resident set. The
prediction is traced without data. Compiled kernels create tensors without an operation, so their
steps are repeated and counted by torch's allocator. Writes plan_validation.json, run by run (runs
that are in it are not repeated), and plan_validation.md.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qlora_cli.plan.rows import PlanRows
    from qlora_cli.plan.trace.memory_counter import MemoryCounter
    from qlora_cli.recipe.schema import Recipe

ROOT = Path(__file__).parents[1]
SMOLLM = "models/smollm2-135m-instruct/SmolLM2-135M-Instruct.Q4_1.gguf"

# A second architecture with random weights: local and global layers in turn, a soft cap on its
# logits (so the model cannot be cut into decoder and head), tied embeddings.
OTHER: dict[str, Any] = {
    "model_type": "gemma2", "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 32000,
    "sliding_window": 128, "tie_word_embeddings": True,
}  # fmt: skip
TINY = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 512}
STAGES = ("step", "evaluation")
MIB = 2**20


def grid() -> Iterator[dict[str, Any]]:
    """List the runs: every value of every setting, in many of the combinations."""
    kinds = [("nf4", "lora"), ("int8", "lora"), ("none", "lora"), ("none", "full")]
    shapes = [(1, 128), (4, 128), (1, 512), (1, 1024)]
    for (quantization, adapter), (rows, length), checkpointing in product(
        kinds, shapes, (True, False)
    ):
        yield _run(quantization, adapter, rows, length, checkpointing)
    yield _run("nf4", "lora", 4, 512, True)
    for optimizer in ("adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"):
        yield _run("nf4", "lora", 1, 256, True, optimizer=optimizer)
        yield _run("none", "full", 1, 256, True, optimizer=optimizer)
    for quantization in ("nf4", "int8", "none"):
        yield _run(quantization, "lora", 2, 256, True, packing=True)
        yield _run(quantization, "lora", 2, 256, True, precision="fp32")
        yield _run(quantization, "lora", 2, 256, True, model="gemma2")
        yield _run(quantization, "lora", 1, 512, False, model="gemma2")
    yield _run("none", "full", 2, 256, True, model="gemma2")
    for quantization, checkpointing in product(("nf4", "none"), (True, False)):
        yield _run(quantization, "lora", 2, 256, checkpointing, kernels="plain")
    for quantization, adapter in kinds:
        yield _run(quantization, adapter, 2, 256, "mlp")
    for quantization, checkpointing in product(("nf4", "none"), (True, "mlp", False)):
        yield _run(quantization, "lora", 2, 256, checkpointing, kernels="compiled")
    for checkpointing in (True, "mlp", False):
        yield _run("nf4", "lora", 1, 1024, checkpointing, kernels="compiled")
    yield _run("nf4", "lora", 2, 256, False, kernels="compiled", precision="fp32")
    yield _run("int8", "lora", 2, 256, True, kernels="plain")
    yield _run("none", "full", 2, 256, True, kernels="plain")


def _run(
    quantization: str, adapter: str, rows: int, length: int, checkpointing: bool | str, **more: Any
) -> dict[str, Any]:
    return {
        "model": "smollm2-135m", "quantization": quantization, "adapter": adapter, "rows": rows,
        "length": length, "checkpointing": checkpointing, "optimizer": "adamw", "packing": False,
        "precision": "bf16", "kernels": "fused", **more,
    }  # fmt: skip


def recipe_of(run: dict[str, Any], model: str) -> Any:
    """Make the recipe of a run."""
    from qlora_cli.recipe.schema import Recipe

    rows = run["rows"]
    return Recipe.model_validate(
        {
            "model": {"path": model},
            "quantization": {"type": run["quantization"]},
            "adapter": {"type": run["adapter"]},
            "data": {
                "train": {"path": "-"},
                "evaluation": {"path": "-"},
                "max_length": run["length"],
                "packing": run["packing"],
            },
            "training": {
                "batch_size": run.get("micro_batches", 2) * rows,
                "micro_batch_size": rows,
                "max_steps": 1,
                "gradient_checkpointing": run["checkpointing"],
                "precision": run["precision"],
                "kernels": run["kernels"],
            },
            "optimizer": {"type": run["optimizer"]},
            "output": {"dir": "-"},
        }
    )


def measure(run: dict[str, Any], model: str) -> dict[str, Any]:
    """Measure a run in this process: predicted and counted bytes, and the resident set."""
    from qlora_cli._compat import quiet_libraries
    from qlora_cli.distributed.devices import find_target
    from qlora_cli.plan.estimate import compute_dtype
    from qlora_cli.plan.rows import assume_rows
    from qlora_cli.plan.trace.libraries import load_libraries

    quiet_libraries()
    load_libraries()
    recipe = recipe_of(run, model)
    dtype = compute_dtype(recipe, find_target("cpu"))
    rows = assume_rows(recipe, "a benchmark", padding_free=True)
    warm_up(run, dtype)
    is_counted = run["kernels"] != "compiled"
    resident, mapped, count = take(recipe, dtype, rows, is_counted=is_counted)
    counted = peaks_of(count) if is_counted else given_out(recipe, dtype, rows)
    return {
        "counted": counted, "resident": resident, "mapped": mapped, **predict(recipe, dtype, rows)
    }  # fmt: skip


def peaks_of(count: MemoryCounter) -> dict[str, int]:
    """Return the counted peak of each stage."""
    return {
        stage: max(peak.total for segment, peak in count.peaks.items() if segment.stage == stage)
        for stage in STAGES
    }


def given_out(recipe: Recipe, dtype: Any, rows: PlanRows) -> dict[str, int]:
    """Return the peak of each stage as the allocator saw it."""
    import torch

    from benchmarks.allocator import Allocator, Marked
    from qlora_cli.loop.fast_path import ComputeOptions
    from qlora_cli.plan.dry_run import dry_run
    from qlora_cli.plan.trace.meta_model import count_model

    base = recipe.model.load(recipe.quantization.load_options(dtype), torch.device("cpu"))
    count = Marked(vocabulary_size=base.config.vocab_size)
    count_model(base, count)
    with Allocator(count.total) as allocator:
        dry_run(
            base, recipe, count, ComputeOptions(dtype, recipe.training.kernels),
            steps=rows.steps, held_out=rows.held_out,
        )  # fmt: skip
    return {stage: allocator.peak(stage) for stage in STAGES}


def predict(recipe: Recipe, dtype: Any, rows: PlanRows) -> dict[str, Any]:
    """Trace the peak of each stage."""
    from qlora_cli.plan.traced_memory import trace_memory

    started = time.perf_counter()
    config, _ = recipe.model.read_config()
    found = trace_memory(
        recipe, config, dtype, device="cpu",
        steps=rows.steps, held_out=rows.held_out, kernels=recipe.training.kernels,
    )  # fmt: skip
    return {
        "predicted": {stage: found.peak(stage)[1].total for stage in STAGES},
        "products": found.products,
        "seconds_of_trace": round(time.perf_counter() - started, 1),
        "traced_layers": list(found.traced_layers),
    }


def take(
    recipe: Recipe,
    dtype: Any,
    rows: PlanRows,
    *,
    is_counted: bool = True,
    load: Callable[[], PreTrainedModel] | None = None,
) -> tuple[int, int, MemoryCounter]:
    """Load (by default as `qlora train` does) and run the steps.

    Returns:
        How far the resident set rose, the bytes that are not in it but in the file of the weights,
        and the count.
    """
    import torch

    from qlora_cli.loop.fast_path import ComputeOptions
    from qlora_cli.plan.dry_run import dry_run
    from qlora_cli.plan.trace.memory_counter import UNQUANTIZED, MemoryCounter
    from qlora_cli.plan.trace.meta_model import count_model

    options = recipe.quantization.load_options(dtype)
    load = load or (lambda: recipe.model.load(options, torch.device("cpu")))
    tidy_up()
    before = _resident()
    with _Watch() as watch:
        base = load()
        count = MemoryCounter(vocabulary_size=base.config.vocab_size)
        count_model(base, count)
        # Unquantized weights are not read from their file but mapped, if their dtype is the file's.
        # Those that are trained are copied to float32.
        is_mapped = dtype == torch.bfloat16 and not recipe.adapter.trains_base
        mapped = count.by_kind[UNQUANTIZED] if is_mapped else 0
        tidy_up()
        watch.restart()
        with count if is_counted else nullcontext():
            dry_run(
                base, recipe, count, ComputeOptions(dtype, recipe.training.kernels),
                steps=rows.steps, held_out=rows.held_out,
            )  # fmt: skip
    return watch.peak - before, mapped, count


def warm_up(run: dict[str, Any], dtype: Any) -> None:
    """Run a tiny model first, so that Python and torch load what they keep."""
    from qlora_cli.plan.rows import assume_rows

    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder), {**OTHER, **TINY})
        recipe = recipe_of({**run, "length": 32}, folder)
        rows = assume_rows(recipe, "a benchmark", padding_free=True)
        take(recipe, dtype, rows, is_counted=run["kernels"] != "compiled")


def tidy_up() -> None:
    """Return freed memory to the system."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def _resident() -> int:
    """Return the bytes of this process that no file backs: weights may stay in their file."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    line = next(line for line in status.splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


class _Watch:
    """The peak of the resident set, sampled every five milliseconds."""

    def __enter__(self) -> Self:
        self.peak = 0
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def restart(self) -> None:
        """Reset the peak."""
        self.peak = 0

    def _look(self) -> None:
        while not self._is_over.wait(0.005):
            self.peak = max(self.peak, _resident())


def make_model(folder: Path, dimensions: dict[str, Any]) -> None:
    """Write a model with random weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**dimensions), dtype=torch.bfloat16
    )
    model.save_pretrained(folder)


def page(results: list[dict[str, Any]]) -> str:
    """Write the results as a page."""
    errors = [abs(error(r, stage)) for r in results for stage in STAGES]
    beside = [beside_resident(r) for r in results]
    fixed = statistics.median(beside)
    predicted = [max(r["predicted"].values()) for r in results]
    whole = [b / p for b, p in zip(beside, predicted, strict=True)]
    shares = [(b - fixed) / p for b, p in zip(beside, predicted, strict=True)]
    lines = [
        "<!-- Written by benchmarks/plan_validation.py; run that instead of editing. -->",
        "# Planned memory against real steps",
        "",
        f"{len(results)} runs on a CPU, each in its own process. Bytes of tensors are predicted",
        "by a trace without data, and counted while the same steps run with real tensors.",
        f"Error of step and evaluation: median {statistics.median(errors):.4%}, maximum",
        f"{max(errors):.4%}.",
        "",
        "The resident set is the anonymous memory of the process plus the weights mapped from",
        "their file, minus its value after the same steps with a tiny model.",
        f"It is {min(beside) / MIB:,.0f} to {max(beside) / MIB:,.0f} MiB above the prediction",
        f"(median {fixed / MIB:,.0f}), independent of the prediction. The difference is memory of",
        "Python for the model's modules, and of libraries, which are not tensors. It is",
        f"{min(whole):.1%} to {max(whole):.0%} of the prediction, and most for the smallest runs.",
        f"Without its median it is {min(shares):+.1%} to {max(shares):+.1%}.",
        "",
        "```bash",
        "python benchmarks/plan_validation.py",
        "```",
        "",
        "| model | held | trained | rows x tokens | checkpointing | kernels | optimizer | other | "
        "predicted MiB | counted MiB | error | evaluation error | resident MiB | difference MiB |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
        *map(_row, results),
    ]
    return "\n".join(lines) + "\n"


def error(result: dict[str, Any], stage: str) -> float:
    """Return the error of a prediction as a share of the count."""
    return float(result["predicted"][stage] / result["counted"][stage] - 1)


def beside_resident(result: dict[str, Any]) -> int:
    """Return how many bytes the process took more than predicted."""
    return int(result["resident"] + result["mapped"] - max(result["predicted"].values()))


def _row(result: dict[str, Any]) -> str:
    run = result["run"]
    other = "packed" if run["packing"] else "fp32" if run["precision"] == "fp32" else ""
    cells = [
        run["model"], run["quantization"], run["adapter"], f"{run['rows']} x {run['length']}",
        {True: "on", False: "off", "mlp": "mlp"}[run["checkpointing"]], run["kernels"],
        run["optimizer"], other, f"{result['predicted']['step'] / MIB:,.1f}",
        f"{result['counted']['step'] / MIB:,.1f}", f"{error(result, 'step'):+.3%}",
        f"{error(result, 'evaluation'):+.3%}",
        f"{(result['resident'] + result['mapped']) / MIB:,.1f}",
        f"{beside_resident(result) / MIB:+,.1f}",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Run the missing runs of the grid, or with --run a single one in this process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        print(json.dumps(measure(json.loads(arguments.run), arguments.model)))
        return
    where = Path(__file__).with_suffix(".json")
    wanted = list(grid())
    done = json.loads(where.read_text(encoding="utf-8")) if where.exists() else []
    results = [result for result in done if result["run"] in wanted]
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder), OTHER)
        models = {"smollm2-135m": str(ROOT / SMOLLM), "gemma2": folder}
        for run in wanted:
            if run in [result["run"] for result in results]:
                continue
            results.append({"run": run, **measure_apart(run, models[run["model"]])})
            print(json.dumps(results[-1]), flush=True)
            where.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    results.sort(key=lambda result: wanted.index(result["run"]))
    where.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    where.with_suffix(".md").write_text(page(results), encoding="utf-8")


def measure_apart(run: dict[str, Any], model: str) -> dict[str, Any]:
    """Call `measure` in a process of its own."""
    # malloc keeps what it was given back otherwise, and the resident set would say so.
    tidy = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", "benchmarks.plan_validation", "--run", json.dumps(run)]
    command += ["--model", model]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **tidy}, stdout=subprocess.PIPE, text=True, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
