"""Compare `qlora eval` and lm-evaluation-harness on zero-shot MMLU, with the same file and prompt.

    python benchmarks/mmlu_parity.py MODEL zero_shot_val.jsonl --limit 400

Rows have `input` (ends in "Answer:") and `output` (a letter). The harness loads the model
itself. Needs `pip install "qlora[harness]"`. Prints a line of JSON.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from qlora_cli.evaluate.evaluate import evaluate
from qlora_cli.recipe.load import load_recipe

LETTERS = ["A", "B", "C", "D"]


def write_recipe(folder: Path, model: str, rows: Path) -> Path:
    """Write the recipe for `qlora eval`."""
    task = {
        "type": "multiple_choice", "name": "mmlu", "question": "{{ input }}", "options": LETTERS,
        "answer": "{{ output }}", "as_chat": False, "data": {"path": str(rows)},
    }  # fmt: skip
    recipe = {
        "model": {"path": model},
        "data": {"train": {"path": str(rows)}},
        "training": {"precision": "fp32", "batch_size": 8, "micro_batch_size": 8},
        "evaluation": {"tasks": [task]},
        "output": {"dir": str(folder / "run")},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def write_task(folder: Path, rows: Path) -> None:
    """Write the task for lm-evaluation-harness."""
    task = {
        "task": "mmlu_file",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(rows)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{input}}",
        "doc_to_choice": LETTERS,
        "doc_to_target": "output",
        "metric_list": [{"metric": name} for name in ("acc", "acc_norm")],
    }
    (folder / "mmlu_file.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")


def by_harness(recipe: Path, folder: Path, limit: int | None) -> tuple[dict[str, Any], list[int]]:
    """Return the harness's figures, and whether each answer is right."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    place = str(load_recipe(recipe).recipe.model.locate())
    found = simple_evaluate(
        HFLM(pretrained=place, dtype="float32", device="cpu", batch_size=8),
        tasks=["mmlu_file"],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        limit=limit,
    )
    assert found is not None
    samples = sorted(found["samples"]["mmlu_file"], key=lambda sample: sample["doc_id"])
    figures = {key: found["results"]["mmlu_file"][f"{key},none"] for key in ("acc", "acc_norm")}
    return figures, [int(sample["acc"]) for sample in samples]


def by_qlora(recipe: Path, folder: Path, limit: int | None) -> tuple[dict[str, Any], list[int]]:
    """Return the figures of `qlora eval`, and whether each answer is right."""
    records = folder / "records.jsonl"
    overrides = [] if limit is None else [f"evaluation.limit={limit}"]
    report = evaluate(recipe, overrides, tasks=["mmlu"], records=records).to_json()
    base = report["models"]["base"]
    rows = [json.loads(line) for line in records.read_text(encoding="utf-8").strip().split("\n")]
    figures = {"acc": base["mmlu"]["value"], "acc_norm": base["mmlu.normalized"]["value"]}
    return figures, [int(row["models"]["base"]["multiple_choice"]) for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="as model.path in a recipe")
    parser.add_argument("rows", type=Path)
    parser.add_argument("--limit", type=int, help="the first rows alone")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, rows = Path(name), arguments.rows.resolve()
        recipe = write_recipe(folder, arguments.model, rows)
        write_task(folder, rows)
        report: dict[str, Any] = {}
        rights = []
        for who, ask in (("qlora", by_qlora), ("lm-eval", by_harness)):
            start = time.perf_counter()
            figures, right = ask(recipe, folder, arguments.limit)
            report[who] = {**figures, "seconds": round(time.perf_counter() - start)}
            rights.append(right)
        ours, theirs = rights
        report["questions"] = len(ours)
        report["answered_alike"] = sum(a == b for a, b in zip(ours, theirs, strict=True))
        print(json.dumps(report))


if __name__ == "__main__":
    main()
