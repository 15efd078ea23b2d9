"""What `qlora plan` predicts against what real steps take, on this machine's CPU.

    python benchmarks/plan_validation.py

Each run of the grid is a process of its own: it loads the model, then makes the steps of
`qlora_cli/rehearsal.py` (the train step, the optimizer and the evaluation of `qlora train`) with
real tensors, which are counted as they are made, while a thread watches the resident set. The
prediction is traced without data. Writes plan_validation.json and plan_validation.md.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).parents[1]
SMOLLM = "models/smollm2-135m-instruct/SmolLM2-135M-Instruct.Q4_1.gguf"

# A second architecture with random weights: local and global layers in turn, a soft cap on its
# logits (so the model cannot be cut into decoder and head), tied embeddings.
OTHER: dict[str, Any] = {
    "model_type": "gemma2", "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 32000,
    "sliding_window": 128, "tie_word_embeddings": True,
}  # fmt: skip


def grid() -> Iterator[dict[str, Any]]:
    """What is run: every value of every setting, in many of the combinations."""
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


def _run(
    quantization: str, adapter: str, rows: int, length: int, checkpointing: bool, **more: Any
) -> dict[str, Any]:
    return {
        "model": "smollm2-135m", "quantization": quantization, "adapter": adapter, "rows": rows,
        "length": length, "checkpointing": checkpointing, "optimizer": "adamw", "packing": False,
        "precision": "bf16", "padding": False, **more,
    }  # fmt: skip


def recipe_of(run: dict[str, Any], model: str) -> Any:
    """The recipe of a run."""
    from qlora_cli.recipe import Recipe

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
                "batch_size": 2 * rows,
                "micro_batch_size": rows,
                "max_steps": 1,
                "gradient_checkpointing": run["checkpointing"],
                "precision": run["precision"],
            },
            "optimizer": {"type": run["optimizer"]},
            "output": {"dir": "-"},
        }
    )


def measure(run: dict[str, Any], model: str) -> dict[str, Any]:
    """Predicted and counted bytes of a run, and the resident set: in this process."""
    import torch

    from qlora_cli._compat import quiet_libraries
    from qlora_cli.estimate import assume_rows, compute_dtype
    from qlora_cli.forecast import forecast
    from qlora_cli.rehearsal import EVALUATION, STEP, rehearse
    from qlora_cli.trace.count import UNQUANTIZED, Count
    from qlora_cli.trace.devices import find_target
    from qlora_cli.trace.kernels import make_constants
    from qlora_cli.trace.model import hold_model

    quiet_libraries()
    recipe = recipe_of(run, model)
    dtype = compute_dtype(recipe, find_target("cpu"))
    config, _ = recipe.model.read_config()
    rows = assume_rows(recipe, "a benchmark", is_flat=not run["padding"])
    started = time.perf_counter()
    predicted = forecast(
        recipe, config, dtype, device="cpu", steps=rows.steps, held_out=rows.held_out
    )
    seconds = time.perf_counter() - started
    make_constants()

    warm_up()
    gc.collect()
    before = _resident()
    with _Watch() as watch:
        base = recipe.model.load(recipe.quantization.load_options(dtype), torch.device("cpu"))
        count = Count(vocabulary_size=base.config.vocab_size)
        hold_model(base, count)
        watch.restart()
        with count:
            rehearse(base, recipe, dtype, count, steps=rows.steps, held_out=rows.held_out)
    resident = watch.peak - before
    found = {
        stage: max(p.total for s, p in count.peaks.items() if s.stage == stage)
        for stage in (STEP, EVALUATION)
    }
    return {
        "predicted": {stage: predicted.peak(stage)[1].total for stage in found},
        "counted": found,
        "resident": resident,
        # Unquantized weights are not read from their file but mapped, if their dtype is the file's.
        "mapped": count.by_kind[UNQUANTIZED] if dtype == torch.bfloat16 else 0,
        "seconds_of_trace": round(seconds, 1),
        "traced_layers": list(predicted.traced_layers),
    }


def warm_up() -> None:
    """Have torch load what it keeps for itself, whatever the model: kernels and their buffers."""
    import torch

    layer = torch.nn.Linear(256, 256)
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            rows = layer(torch.ones(1, 2, 128, 256))
            torch.nn.functional.scaled_dot_product_attention(rows, rows, rows).sum().backward()


def _resident() -> int:
    """Bytes of this process that are not of a file: weights may stay in the file they are in."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    line = next(line for line in status.splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


class _Watch:
    """The highest resident set, looked at every five milliseconds."""

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
        """Forget what was before."""
        self.peak = 0

    def _look(self) -> None:
        while not self._is_over.wait(0.005):
            self.peak = max(self.peak, _resident())


def make_other(folder: Path) -> None:
    """Write the second model, with random weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**OTHER), dtype=torch.bfloat16)
    model.save_pretrained(folder)


def page(results: list[dict[str, Any]]) -> str:
    """The results as a page."""
    errors = [abs(r["error"]) for r in results]
    rss = [(r["resident"] + r["mapped"]) / r["predicted"]["step"] - 1 for r in results]
    lines = [
        "<!-- Written by benchmarks/plan_validation.py; run that instead of editing. -->",
        "# What a plan predicts, and what real steps take",
        "",
        f"{len(results)} runs on a CPU, each in a process of its own: bytes of tensors, predicted",
        "by a trace without data and counted while the same steps are made with real tensors.",
        f"Median error {statistics.median(errors):.3%}, worst {max(errors):.3%}. The resident set",
        "(anonymous memory of the process less what it was before the model was loaded, and the",
        f"weights that are mapped from their file) is {min(rss):+.1%} to {max(rss):+.1%} beside",
        f"the prediction, in the median {statistics.median(rss):+.1%}.",
        "",
        "```bash",
        "python benchmarks/plan_validation.py",
        "```",
        "",
        "| model | held | trained | rows x tokens | checkpointing | optimizer | other | "
        "predicted MiB | counted MiB | error | resident MiB | evaluation error |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        run, mib = r["run"], 2**20
        other = "packed" if run["packing"] else "fp32" if run["precision"] == "fp32" else ""
        evaluation = r["predicted"]["evaluation"] / r["counted"]["evaluation"] - 1
        cells = [
            run["model"], run["quantization"], run["adapter"], f"{run['rows']} x {run['length']}",
            "on" if run["checkpointing"] else "off", run["optimizer"], other,
            f"{r['predicted']['step'] / mib:,.1f}", f"{r['counted']['step'] / mib:,.1f}",
            f"{r['error']:+.3%}", f"{(r['resident'] + r['mapped']) / mib:,.1f}",
            f"{evaluation:+.3%}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the grid, or (with --run, in a process of its own) one of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        print(json.dumps(measure(json.loads(arguments.run), arguments.model)))
        return
    # malloc keeps what it was given back otherwise, and the resident set would say so.
    tidy = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    results = []
    with tempfile.TemporaryDirectory() as folder:
        make_other(Path(folder))
        models = {"smollm2-135m": str(ROOT / SMOLLM), "gemma2": folder}
        for run in grid():
            command = [sys.executable, __file__, "--run", json.dumps(run)]
            done = subprocess.run(
                [*command, "--model", models[run["model"]]],
                env={**os.environ, **tidy}, stdout=subprocess.PIPE, text=True, check=True,
            )  # fmt: skip
            result = {"run": run, **json.loads(done.stdout.splitlines()[-1])}
            result["error"] = result["predicted"]["step"] / result["counted"]["step"] - 1
            results.append(result)
            print(run, f"{result['error']:+.4%}", result["resident"], flush=True)
    where = Path(__file__).with_suffix("")
    where.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    where.with_suffix(".md").write_text(page(results), encoding="utf-8")


if __name__ == "__main__":
    main()
