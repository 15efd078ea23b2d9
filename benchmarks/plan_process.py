"""Compare the planned memory of the process with runs of `qlora train` on this machine's CPU.

    python -m benchmarks.plan_process --gsm8k train.jsonl

Each cell is one run on GSM8K through the command line. Its peak is the largest resident set of the
process, as the run records it. Writes plan_process.json, run by run (runs that are in it are
not repeated), and plan_process.md. The plans are made when the page is written, so a change of the
plan needs no new runs (`--at-most 0`).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RECIPE = "benchmarks/gsm8k.yaml"
SMOLLM = "models/smollm2-135m-instruct/SmolLM2-135M-Instruct.Q4_1.gguf"
STEPS = 12
MIB = 2**20
RANDOM = ("tiny", "gemma3")


def grid() -> Iterator[dict[str, Any]]:
    """List the cells, the most informative first."""
    yield make_cell("nf4", "plain", 4)
    yield make_cell("nf4", "fused", 4)
    yield make_cell("nf4", "fused", 1, checkpointing=True)
    yield make_cell("none", "plain", 4)
    yield make_cell("tiny", "fused", 4)
    yield make_cell("nf4", "fused", 4, batch=16)
    yield make_cell("nf4", "compiled", 4)
    yield make_cell("int8", "fused", 4)
    yield make_cell("none", "fused", 4, checkpointing=True)
    yield make_cell("nf4", "fused", 1, batch=2, precision="bf16")
    yield make_cell("full", "fused", 1, checkpointing=True, batch=2)
    yield make_cell("nf4", "fused", 4, cache="empty")
    yield make_cell("none", "compiled", 1, batch=2)
    yield make_cell("gemma3", "plain", 4, steps=40)


def make_cell(
    held: str,
    kernels: str,
    micro_batch: int,
    *,
    checkpointing: bool = False,
    rows: int | None = None,
    batch: int = 4,
    cache: str = "filled",
    precision: str = "auto",
    steps: int = STEPS,
) -> dict[str, Any]:
    """Describe a run.

    Args:
        held: nf4, int8 or none; full trains all weights, tiny is a small random model, gemma3 is a
            random model with the shape of Gemma 3 270M.
        rows: training rows; None is all of them.
        batch: rows a step.
        cache: empty means that the model's file is unpacked and the rows are prepared in the run.
    """
    return {
        "held": held, "kernels": kernels, "micro_batch": micro_batch, "batch": batch,
        "checkpointing": checkpointing, "rows": rows, "cache": cache, "steps": steps,
        "precision": precision,
    }  # fmt: skip


def settings_of(cell: dict[str, Any], gsm8k: str, random: str) -> dict[str, Any]:
    """Return the recipe keys of a cell, with their values."""
    held = {"full": "none", "tiny": "none", "gemma3": "nf4"}.get(cell["held"], cell["held"])
    return {
        "model.path": f"{random}/{cell['held']}" if cell["held"] in RANDOM else SMOLLM,
        **({} if held == "nf4" else {"quantization": {"type": held}}),
        **({"adapter": {"type": "full"}} if cell["held"] == "full" else {}),
        "data.train.path": gsm8k,
        "data.train.limit": cell["rows"],
        "data.evaluation": None,
        "training.epochs": None,
        "training.max_steps": cell["steps"],
        "training.batch_size": cell["batch"],
        "training.micro_batch_size": cell["micro_batch"],
        "training.gradient_checkpointing": cell["checkpointing"],
        "training.kernels": cell["kernels"],
        "training.precision": cell["precision"],
    }


def measure(settings: dict[str, Any], cell: dict[str, Any]) -> dict[str, Any]:
    """Run a cell in a process of its own, and return the bytes of its peak."""
    with tempfile.TemporaryDirectory() as folder:
        environment = dict(os.environ)
        if cell["cache"] == "empty":
            environment["QLORA_CACHE"] = f"{folder}/cache"
        # Linux counts the peak of the caller for a process that it starts, so a shell starts it.
        started = time.monotonic()
        command = ["sh", "-c", '"$@"; exit $?', "sh"]
        command += [sys.executable, "-m", "qlora_cli", "-q", "train", RECIPE]
        for key, value in {**settings, "output.dir": f"{folder}/run"}.items():
            command += ["--set", f"{key}={json.dumps(value)}"]
        subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, check=True)
        record = json.loads(Path(f"{folder}/run/run.json").read_text(encoding="utf-8"))
        lines = Path(f"{folder}/run/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    metrics = [json.loads(line) for line in lines]
    by_step = {m["step"]: m["peak_memory_bytes"] for m in metrics if "peak_memory_bytes" in m}
    return {
        "cell": cell,
        "peak": record["peak_memory_bytes"],
        "peak_after_first_step": by_step[1],
        "threads": os.environ.get("OMP_NUM_THREADS", "all"),
        "seconds": round(time.monotonic() - started),
    }


def plan_of(settings: dict[str, Any]) -> dict[str, Any]:
    """Plan a cell, and return the bytes of its tensors and of the range."""
    from qlora_cli.plan.plan import plan
    from qlora_cli.recipe.load import load_recipe

    sets = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    report = plan(load_recipe(ROOT / RECIPE, sets).recipe, device="cpu")
    process = report.process
    return {"tensors": report.peak.bytes, "low": process.low, "high": process.high}


def make_random(folder: str) -> None:
    """Write the random models with the tokenizer of the demo model, in a process of its own."""
    code = (
        "import sys, torch\n"
        "from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer\n"
        "from transformers import Gemma3TextConfig\n"
        "from benchmarks.plan_process import ROOT, SMOLLM\n"
        "from qlora_cli.models.gguf import unpack_gguf\n"
        "source = unpack_gguf(ROOT / SMOLLM)\n"
        "tiny = AutoConfig.from_pretrained(source, hidden_size=64, intermediate_size=128,\n"
        "    num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=16)\n"
        "gemma = Gemma3TextConfig(hidden_size=640, intermediate_size=2048, num_hidden_layers=18,\n"
        "    num_attention_heads=4, num_key_value_heads=1, head_dim=256, sliding_window=512,\n"
        "    bos_token_id=tiny.bos_token_id, eos_token_id=tiny.eos_token_id,\n"
        "    pad_token_id=tiny.pad_token_id)\n"
        "for name, config in (('tiny', tiny), ('gemma3', gemma)):\n"
        "    torch.manual_seed(0)\n"
        "    AutoModelForCausalLM.from_config(config).save_pretrained(f'{sys.argv[1]}/{name}')\n"
        "    AutoTokenizer.from_pretrained(source).save_pretrained(f'{sys.argv[1]}/{name}')\n"
    )
    subprocess.run([sys.executable, "-c", code, folder], cwd=ROOT, check=True)


def page(results: list[dict[str, Any]]) -> str:
    """Write the results as a page."""
    outside = [r for r in results if not r["low"] <= r["peak"] <= r["high"]]
    widths = [r["high"] / r["low"] for r in results]
    names = "; ".join(" ".join(_name(r["cell"])) for r in outside)
    missing = len(list(grid())) - len(results)
    left = f" {missing} cells of the grid were not run yet." if missing else ""
    said = f"{len(outside)} are outside the range: {names}." if outside else "All are inside."
    lines = [
        "<!-- Written by benchmarks/plan_process.py; run that instead of editing. -->",
        "# Planned memory of the process against runs",
        "",
        f"{len(results)} runs of `qlora train` on a CPU, on GSM8K: {STEPS} steps, `gemma3` 40.",
        "The peak is the largest resident set of the process, from its start to its end.",
        f"{said} The upper end of the range is {min(widths):.2f} to {max(widths):.2f} times the",
        f"lower one.{left}",
        "",
        "SmolLM2-135M computes in float32 on this machine. `tiny` is a random model with its",
        "vocabulary; `gemma3` is a random model with the shape of Gemma 3 270M, in NF4. `full`",
        "trains all weights. The other runs train LoRA adapters. Columns after the peak are the",
        "plan: tensors at their peak, the range, and the place of the peak in the range (0 is the",
        "lower end, 1 the upper one).",
        "",
        "```bash",
        "python -m benchmarks.plan_process --gsm8k train.jsonl",
        "```",
        "",
        "| held | kernels | micro-batch | rows a step | checkpointing | training rows | "
        "after 1 step MiB | peak MiB | tensors MiB | low MiB | high MiB | place |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
        *map(_row, results),
    ]
    return "\n".join(lines) + "\n"


def _name(cell: dict[str, Any]) -> list[str]:
    rows = "all" if cell["rows"] is None else str(cell["rows"])
    return [
        cell["held"], cell["kernels"], str(cell["micro_batch"]), str(cell["batch"]),
        "on" if cell["checkpointing"] else "off",
        rows + (", first run" if cell["cache"] == "empty" else ""),
    ]  # fmt: skip


def _row(result: dict[str, Any]) -> str:
    place = (result["peak"] - result["low"]) / (result["high"] - result["low"])
    keys = ("peak_after_first_step", "peak", "tensors", "low", "high")
    cells = [*_name(result["cell"]), *(f"{result[key] / MIB:,.0f}" for key in keys), f"{place:.2f}"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Run the missing cells, then plan all of them and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gsm8k", required=True, help="the file with the rows of GSM8K")
    parser.add_argument("--at-most", type=int, default=99, help="run at most so many cells")
    arguments = parser.parse_args()
    where = Path(__file__).with_suffix(".json")
    wanted = list(grid())
    done = json.loads(where.read_text(encoding="utf-8")) if where.exists() else []
    results = [result for result in done if result["cell"] in wanted]
    with tempfile.TemporaryDirectory() as random:
        make_random(random)
        known = [result["cell"] for result in results]
        missing = [cell for cell in wanted if cell not in known]
        for cell in missing[: arguments.at_most]:
            results.append(measure(settings_of(cell, arguments.gsm8k, random), cell))
            print(json.dumps(results[-1]), flush=True)
            where.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        for result in results:
            result.update(plan_of(settings_of(result["cell"], arguments.gsm8k, random)))
    results.sort(key=lambda result: wanted.index(result["cell"]))
    where.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    where.with_suffix(".md").write_text(page(results), encoding="utf-8")


if __name__ == "__main__":
    main()
