"""Compare orders of addition in training: float32, ours and PEFT's, on the same rows.

    python -m benchmarks.addition_order --data FOLDER_WITH_GSM8K --model NAME=FOLDER_OR_GGUF

A cell is a model, a base (nf4 or none), a learning rate, a rank and a seed. The seed draws the
adapter and the rows. Each cell trains the same adapter in three ways:

- PEFT's layers in float32: the reference. Its base has the same values as the other two.
- Our layers in bfloat16: the update is computed first, and the sum is rounded once.
- PEFT's layers in bfloat16 (float32 adapter under autocast): the product is rounded, then the
  update is added.

Nothing else differs: transformers' layers, attention by document, loss, optimizer and loop are the
same.

Results are saved after each training, so a second call adds to them and an interrupted one resumes.
Writes benchmarks/addition_order.json and, from it, addition_order.md. A setting appears on the page
once one of its seeds has been trained in all three ways.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.addition_order.page import WAYS, Cell, Record, as_markdown, find, untrained
from benchmarks.addition_order.training import BASES, Work, measure_untrained, run
from benchmarks.quantization_curves import processor
from benchmarks.race.rows import gsm8k
from benchmarks.race.stage import versions
from qlora_cli._compat import quiet_libraries
from qlora_cli.data.config import Data
from qlora_cli.data.prepared.prepare import prepare
from qlora_cli.distributed.world import World
from qlora_cli.models.base import BaseModelConfig
from qlora_cli.types import Example

BENCHMARKS = Path(__file__).resolve().parent.parent
COMMAND = "python -m benchmarks.addition_order --data FOLDER_WITH_GSM8K"

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ 'Question: ' + message['content'] + '\nAnswer:\n' }}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
)
"""One prompt format for base and chat models."""


def main() -> None:
    options = parse(sys.argv[1:])
    quiet_libraries()
    report = head(options)
    for path, cells in planned(options):
        work = prepare_work(path, options)
        for cell in cells:
            run_cell(cell, work, report, options.output)
    write(report, options.output)


def parse(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="train.jsonl and test.jsonl")
    parser.add_argument("--model", action="append", default=[], metavar="NAME=PATH", required=True)
    parser.add_argument("--bases", nargs="+", choices=list(BASES), default=list(BASES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--learning-rates", nargs="+", type=float, default=[2e-4])
    parser.add_argument("--ranks", nargs="+", type=int, default=[16])
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--rows-per-step", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=128, help="drop longer rows")
    parser.add_argument("--held-out", type=int, default=64, help="rows of test.jsonl")
    parser.add_argument("--output", type=Path, default=BENCHMARKS / "addition_order.json")
    return parser.parse_args(words)


def head(options: argparse.Namespace) -> Record:
    """Load earlier results, and describe this machine and its versions."""
    found: Record = {"runs": []}
    if options.output.exists():
        found = json.loads(options.output.read_text(encoding="utf-8"))
    git = ["git", "-C", str(BENCHMARKS), "describe", "--always", "--abbrev=12"]
    return found | {
        "command": f"{COMMAND} --model NAME=FOLDER_OR_GGUF",
        "commit": subprocess.check_output(git, text=True).strip(),
        "processor": processor(),
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": versions(sys.executable),
    }


def planned(options: argparse.Namespace) -> Iterator[tuple[Path, list[Cell]]]:
    """Yield the cells to run, seed by seed, grouped by model."""
    for seed, named in itertools.product(options.seeds, options.model):
        name, _, path = named.partition("=")
        yield (
            Path(path),
            [
                Cell(
                    model=name,
                    base=base,
                    learning_rate=rate,
                    r=r,
                    steps=options.steps,
                    rows_per_step=options.rows_per_step,
                    max_length=options.max_length,
                    seed=seed,
                )
                for base, rate, r in itertools.product(
                    options.bases, options.learning_rates, options.ranks
                )
            ],
        )


def prepare_work(path: Path, options: argparse.Namespace) -> Work:
    """Prepare rows as `qlora train` does, without those longer than `--max-length`."""
    tokenizer = BaseModelConfig(path=str(path)).load_tokenizer()
    tokenizer.chat_template = TEMPLATE

    def examples(name: str, most: int | None) -> list[Example]:
        with tempfile.TemporaryDirectory() as folder:
            rows = Path(folder) / "rows.jsonl"
            conversations = gsm8k(options.data, 10**6, name)
            lines = (json.dumps({"messages": one}) + "\n" for one in conversations)
            rows.write_text("".join(lines), encoding="utf-8")
            data = Data.model_validate(
                {
                    "train": {"path": str(rows)},
                    "max_length": options.max_length,
                    "truncate": "drop",
                    "max_lost": 1.0,
                }
            )
            found = prepare(data.train_sources, tokenizer, data, Path(folder)).examples
            return list(itertools.islice(found, most))

    return Work(
        path,
        examples("train.jsonl", None),
        examples("test.jsonl", options.held_out),
        tokenizer.pad_token_id,
        World(),
    )


def run_cell(cell: Cell, work: Work, report: Record, output: Path) -> None:
    """Train the cell in the ways that are missing from the report."""
    todo = [("untrained", untrained(cell)), *((way, cell) for way in WAYS)]
    for way, one in todo:
        if find(report, way, one) is None:
            started = time.time()
            measured = measure_untrained(one, work) if way == "untrained" else run(way, one, work)
            measured["seconds"] = round(time.time() - started)
            report["runs"].append({"way": way, "cell": asdict(one), **measured})
            write(report, output)
            print(way, asdict(one), measured, flush=True)


def write(report: Record, output: Path) -> None:
    """Write both files atomically."""
    for path, text in (
        (output, json.dumps(report, indent=1) + "\n"),
        (output.with_suffix(".md"), as_markdown(report)),
    ):
        unfinished = path.with_name(f".{path.name}.unfinished")
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path)


if __name__ == "__main__":
    main()
