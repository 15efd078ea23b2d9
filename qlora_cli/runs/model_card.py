"""Model cards: the README.md of weights, with their origin, settings and measurements."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any, get_args

import yaml

from qlora_cli.common.atomic_files import replace_file
from qlora_cli.common.config import Config
from qlora_cli.data.sources import Source
from qlora_cli.recipe.load import load_recipe
from qlora_cli.recipe.schema import Recipe
from qlora_cli.runs.card_code import card_code, is_on_hub, public
from qlora_cli.runs.evaluation_table import evaluation_table
from qlora_cli.runs.merge_report import MergeReport, merge_text
from qlora_cli.runs.run_folder import RunFolder, Weights

_MEANT = 10
"""Logged steps over which a training loss is averaged."""
_VERSIONS = ("qlora", "torch", "transformers", "peft", "bitsandbytes")


def write_cards(run: RunFolder) -> None:
    """Write a card into each folder of a run's weights (in place of PEFT's empty template)."""
    for weights in get_args(Weights):
        folder = run.root / weights
        if folder.is_dir():
            text = model_card(run, weights, name=run.root.resolve().name)
            replace_file(folder / "README.md", text)


def model_card(
    run: RunFolder, weights: Weights, *, name: str, proof: MergeReport | None = None
) -> str:
    """Format a model card for the Hub: YAML front matter, then Markdown.

    Paths are shortened to their last part, and nothing describes the machine.

    Args:
        name: the heading, and the folder's name in the code example.
        proof: the report of `merge`, if the card is for a merged model.
    """
    recipe = load_recipe(run.recipe).recipe
    record = run.read_record()
    is_whole = proof is not None or recipe.adapter.trains_all
    is_partial = not is_whole and recipe.adapter.trains_base
    kind = "fine-tuned model" if is_whole else f"{recipe.adapter.type} adapter"
    if is_partial:
        kind = f"part of a fine-tuned model ({recipe.adapter.type})"
    base = public(recipe.model.path)
    lines = [
        "---",
        yaml.safe_dump(_front_matter(recipe, is_whole), sort_keys=False).rstrip(),
        "---",
        "",
        f"# {name}",
        "",
        f"A {kind}, made from {base} with `qlora`. The licence of the base model applies.",
        "",
        "## Use",
        "",
        "```python",
        *card_code(
            recipe,
            name,
            is_whole=is_whole,
            has_tools=_has_tools(record),
            precision=record.get("precision"),
        ),
        "```",
        "",
        "## Training",
        "",
        "| | |",
        "|---|---|",
        *(f"| {key} | {_cell(value)} |" for key, value in _facts(recipe, record, run, weights)),
    ]
    for title, text in _measurements(record, weights, name, proof):
        lines += ["", f"## {title}", "", "```text", text, "```"]
    return "\n".join([*lines, ""])


_SCORING = "text-classification"
"""The Hub's name for models that score rows."""


def _front_matter(recipe: Recipe, is_whole: bool) -> dict[str, Any]:
    """Fields that the Hub indexes. A base or dataset that is not on the Hub is left out."""
    entries: dict[str, Any] = {
        "library_name": "transformers" if is_whole or recipe.adapter.trains_base else "peft",
        "pipeline_tag": "text-generation" if recipe.objective.head is None else _SCORING,
    }
    if is_on_hub(recipe.model.path):
        entries["base_model"] = recipe.model.path
        entries["base_model_relation"] = "finetune" if is_whole else "adapter"
    paths = dict.fromkeys(source.path for source in recipe.data.train_sources)
    if datasets := [path for path in paths if is_on_hub(path)]:
        entries["datasets"] = datasets
    tags: list[str] = [recipe.adapter.type]
    if recipe.quantization.is_quantized:
        tags += ["qlora", recipe.quantization.type]
    return {**entries, "tags": tags}


def _facts(
    recipe: Recipe, record: Mapping[str, Any], run: RunFolder, weights: Weights
) -> Iterator[tuple[str, str]]:
    """Rows of the table: base, adapter, data, settings and results."""
    revision = recipe.model.revision
    at = f", revision {revision}" if revision else ""
    yield "base model", public(recipe.model.path) + at
    yield "base held in", _summary(recipe.quantization)
    yield "adapter", _summary(recipe.adapter)
    if combined := record.get("combined"):
        parents = zip(combined["weights"], combined["adapters"], strict=True)
        parts = " + ".join(f"{weight:g} x {Path(path).name}" for weight, path in parents)
        yield "combined", f"{parts} by {combined['method']}"
        return
    if parent := record.get("parent"):
        yield "began from", _chain(parent)
    yield (
        "trained weights",
        f"{record['trained_weights']:,} of {record['total_weights']:,}",
    )
    yield "training data", _data(recipe.data.train_sources, record["data"]["training"])
    if held_out := record["data"]["evaluation"]:
        yield "held-out data", _data(recipe.data.evaluation_sources, held_out)
    training = recipe.training
    packed = ", packed" if recipe.data.packing else ""
    yield (
        "steps",
        f"{record['steps']} of {training.batch_size} rows of at most "
        f"{recipe.data.max_length} tokens{packed}",
    )
    yield "optimizer", _optimizer(recipe, record)
    yield "schedule", _summary(recipe.schedule)
    yield "precision", record.get("precision", training.precision)
    yield "seed", str(training.seed)
    best = record.get("best")
    if weights == "best" and best:
        yield "weights", f"those after step {best['step']}, with the best {best['by']}"
    else:
        yield "weights", "those after the last step"
    yield from _losses(record, run)
    packages = record["packages"]
    yield "versions", ", ".join(f"{name} {packages[name]}" for name in _VERSIONS)


def _chain(parent: Mapping[str, Any]) -> str:
    which = "" if parent["weights"] is None else f"{parent['weights']} weights, "
    text = f"{parent['name']} ({which}sha256 {parent['digest'][:12]})"
    before = parent["parent"]
    return text if before is None else f"{text}, which began from {_chain(before)}"


def _losses(record: Mapping[str, Any], run: RunFolder) -> Iterator[tuple[str, str]]:
    lines = (run.root / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    held_out = [row for row in rows if row.get("eval_loss") is not None]
    if held_out:
        yield (
            "held-out loss",
            ", ".join(
                f"{row['eval_loss']:.4f} {_when(row)}" for row in [held_out[0], *held_out[1:][-1:]]
            ),
        )
    elif losses := [row["loss"] for row in rows if row.get("loss") is not None]:
        number = min(_MEANT, len(losses))
        first, last = losses[:number], losses[-number:]
        yield (
            "training loss",
            f"mean {fmean(first):.4f} over the first {number} logged steps, {fmean(last):.4f} "
            f"over the last {number}; each step has other rows, so it varies",
        )
    if best := record.get("best"):
        before = record.get("untrained")
        start = "" if before is None else f"{before['value']:.4f} untrained, "
        yield f"best {best['by']}", f"{start}{best['value']:.4f} at step {best['step']}"


def _when(row: Mapping[str, Any]) -> str:
    """Say when held-out rows were measured."""
    return f"after step {row['step']}" if row["step"] else "before training"


def _has_tools(record: Mapping[str, Any]) -> bool:
    """Tell if training rows declared tools. Records of earlier versions do not say."""
    data = record.get("data") or {}
    return bool((data.get("training") or {}).get("num_with_tools"))


def _optimizer(recipe: Recipe, record: Mapping[str, Any]) -> str:
    """Describe the optimizer that ran, which may not be the one of the recipe."""
    wanted = recipe.optimizer.type
    used = record.get("optimizer", wanted)
    text = _summary(recipe.optimizer)
    if used == wanted:
        return text
    return f"{used}{text.removeprefix(wanted)} (the recipe's {wanted} needs CUDA for paging)"


def _measurements(
    record: Mapping[str, Any], weights: Weights, name: str, proof: MergeReport | None
) -> Iterator[tuple[str, str]]:
    # The text of the terminal, with the name in place of a local folder.
    evaluation = record.get("evaluation")
    if evaluation and evaluation["weights"] == weights:
        yield "Evaluation", evaluation_table({**evaluation, "target": name})
    if proof is not None:
        yield "Merge", merge_text(replace(proof, output=name))


def _data(sources: list[Source], counts: Mapping[str, Any]) -> str:
    names = ", ".join(dict.fromkeys(_source(source) for source in sources))
    return (
        f"{names}: {counts['num_rows']:,} rows, {counts['num_tokens']:,} tokens, "
        f"{counts['num_supervised']:,} of them supervised"
    )


def _source(source: Source) -> str:
    if not is_on_hub(source.path):
        return public(source.path)
    parts = [source.path, source.name, source.split, source.revision]
    return " ".join(part for part in parts if part)


def _summary(part: Config) -> str:
    """The type of a section, and its settings that are neither off nor empty."""
    values = part.model_dump(mode="json")
    settings = [
        f"{key} {_setting(value)}"
        for key, value in values.items()
        if key != "type" and value not in (None, False, [], {})
    ]
    return f"{values['type']}: {', '.join(settings)}" if settings else values["type"]


def _setting(value: Any) -> str:
    if isinstance(value, bool):
        return "on"
    if isinstance(value, float):
        return f"{value:g}"
    return public(value) if isinstance(value, str) else json.dumps(value)


def _cell(text: str) -> str:
    return text.replace("|", r"\|").replace("\n", " ")
