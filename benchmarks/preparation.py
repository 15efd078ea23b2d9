"""Compare rows per second of preparation with TRL's SFTTrainer, on the same rows.

    python benchmarks/preparation.py --model MODEL --gsm8k train.jsonl --peer-python PYTHON

Both prepare the same conversations with the same tokenizer and template, and train only on the
assistant's turns. Ours: read, render, tokenize, label, check and write rows to a new folder.
TRL's: from `Dataset.from_list` on, the constructor of SFTTrainer with a model of two layers, with a
template that marks the assistant's turns, into a new cache folder. Each run is a process of its
own, ours and TRL's alternating; imports and loading are not timed.

PYTHON is an interpreter with trl, peft and the same transformers as this environment.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
REPEATS = 3
MAX_LENGTH = 8192

# ChatML in the words that TRL needs to find the assistant's turns; ours is the same without them.
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>' + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def gsm8k(path: Path) -> list[list[dict[str, str]]]:
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [
        [
            {"role": "user", "content": row["question"]},
            {"role": "assistant", "content": row["answer"]},
        ]
        for row in rows
    ]


def long_conversations(count: int = 300, turns: int = 50) -> list[list[dict[str, str]]]:
    """Make conversations of `turns` messages of 5 to 40 words."""
    draw = random.Random("long conversations")
    text = "the river road house of light and stone carries seven small boats to market"
    words = text.split()
    return [
        [
            {
                "role": "assistant" if turn % 2 else "user",
                "content": " ".join(draw.choices(words, k=draw.randint(5, 40))),
            }
            for turn in range(turns)
        ]
        for _ in range(count)
    ]


def ours(model: Path, data: Path) -> dict[str, float]:
    from qlora_cli.data.config import Data
    from qlora_cli.data.prepared.prepare import prepare
    from qlora_cli.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(model)
    tokenizer.chat_template = TEMPLATE
    settings = Data.model_validate({"train": {"path": str(data)}, "max_length": MAX_LENGTH})
    with tempfile.TemporaryDirectory() as folder:
        started, used = time.perf_counter(), time.process_time()
        prepared = prepare(settings.train_sources, tokenizer, settings, Path(folder))
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - used
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "tokens": prepared.num_tokens,
        "supervised": prepared.num_supervised,
    }


def theirs(model: Path, data: Path) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_DATASETS_CACHE"] = folder
        import datasets
        from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
        from trl import SFTConfig, SFTTrainer

        tokenizer = AutoTokenizer.from_pretrained(model)
        tokenizer.chat_template = TEMPLATE
        tiny = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
            )
        )
        config = SFTConfig(
            output_dir=folder,
            assistant_only_loss=True,
            max_length=MAX_LENGTH,
            report_to="none",
            use_cpu=True,
            bf16=False,
        )
        rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
        started, used = time.perf_counter(), time.process_time()
        dataset = datasets.Dataset.from_list(rows)
        trainer = SFTTrainer(
            model=tiny, args=config, train_dataset=dataset, processing_class=tokenizer
        )
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - used
        made = trainer.train_dataset
        names = {"assistant_masks", "labels"} & set(made.column_names)
        masks = [row for name in sorted(names)[:1] for row in made[name]]
        supervised = sum(value not in (0, -100) for row in masks for value in row)
        return {
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
            "tokens": sum(map(len, made["input_ids"])),
            "supervised": supervised,
        }


def run(python: str, who: str, model: Path, data: Path) -> dict[str, float]:
    command = [python, str(HERE / "preparation.py"), "--only", who]
    command += ["--model", str(model), "--data", str(data)]
    environment = os.environ | {"OMP_NUM_THREADS": "2", "RAYON_NUM_THREADS": "2"}
    environment |= {"PYTHONPATH": str(HERE.parent), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        sys.exit(f"{who} failed:\n{done.stderr[-2000:]}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def table(report: dict[str, Any]) -> str:
    lines = [
        "# Preparation",
        "",
        f"Rows per second of {REPEATS} runs each in turn: lowest / median / highest. Processor "
        "seconds: median over the runs, of all threads, ours and theirs; other work on the machine "
        "affects them less. "
        f"{report['machine']}, 2 threads; {report['note']}",
        "",
        "| data | rows | tokens | qlora | TRL | median, ours to theirs | processor seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, figures in report["data"].items():
        cells = [
            " / ".join(f"{rate:,.0f}" for rate in figures[who]["rows_per_second"])
            for who in ("ours", "theirs")
        ]
        ratio = figures["ours"]["rows_per_second"][1] / figures["theirs"]["rows_per_second"][1]
        lines.append(
            f"| {name} | {figures['rows']:,} | {figures['ours']['tokens']:,} | {cells[0]} | "
            f"{cells[1]} | {ratio:.1f} | "
            f"{figures['ours']['cpu_seconds']:.1f}, {figures['theirs']['cpu_seconds']:.1f} |"
        )
    versions = ", ".join(f"{name} {version}" for name, version in report["packages"].items())
    return "\n".join([*lines, "", f"Versions: {versions}. Command: `{report['command']}`.", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder with the tokenizer")
    parser.add_argument("--gsm8k", type=Path, help="training split of GSM8K, as jsonl")
    parser.add_argument("--peer-python", help="interpreter with trl")
    parser.add_argument("--note", default="nothing else ran.", help="other load on the machine")
    parser.add_argument("--only", choices=["ours", "theirs"], help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        print(json.dumps({"ours": ours, "theirs": theirs}[args.only](args.model, args.data)))
        return

    pythons = {"ours": sys.executable, "theirs": args.peer_python}
    report: dict[str, Any] = {
        "command": "python benchmarks/preparation.py --model MODEL --gsm8k train.jsonl "
        "--peer-python PYTHON",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "note": args.note,
        "packages": {
            name: importlib.metadata.version(name) for name in ("transformers", "tokenizers")
        },
        "data": {},
    }
    trl = "import importlib.metadata as m; print(m.version('trl'))"
    report["packages"]["trl"] = subprocess.check_output(
        [args.peer_python, "-c", trl], text=True
    ).strip()
    sets = {"GSM8K train": gsm8k(args.gsm8k), "300 of 50 turns": long_conversations()}
    for name, conversations in sets.items():
        with tempfile.TemporaryDirectory() as folder:
            data = Path(folder) / "rows.jsonl"
            data.write_text(
                "".join(json.dumps({"messages": one}) + "\n" for one in conversations),
                encoding="utf-8",
            )
            runs: dict[str, list[dict[str, float]]] = {"ours": [], "theirs": []}
            for _ in range(REPEATS):
                for who, python in pythons.items():
                    runs[who].append(run(python, who, args.model, data))
        report["data"][name] = {"rows": len(conversations)} | {
            who: {
                "tokens": results[0]["tokens"],
                "supervised": results[0]["supervised"],
                "cpu_seconds": round(statistics.median(one["cpu_seconds"] for one in results), 2),
                "rows_per_second": [
                    round(len(conversations) / pick(one["seconds"] for one in results), 1)
                    for pick in (max, statistics.median, min)
                ],
            }
            for who, results in runs.items()
        }
    (HERE / "preparation.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (HERE / "preparation.md").write_text(table(report), encoding="utf-8")
    print(table(report))


if __name__ == "__main__":
    main()
