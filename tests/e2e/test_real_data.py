"""Real data of every kind: previewed, and trained on. Skipped where it is not at hand.

The data lies in a folder of its own (QLORA_TEST_DATA, else ../shared/data), and the tokenizer is
that of the demo model (scripts/get_demo_model.py).
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from qlora_cli.inspect.preview import preview
from qlora_cli.models.base import BaseModelConfig
from qlora_cli.models.tokenizer import load_tokenizer
from qlora_cli.recipe.load import load_recipe
from qlora_cli.train.train import train
from tests.conftest import DATA, MODEL, ROOT, needs_data, needs_model, save_tiny_model

GSM8K = {"type": "prompt_completion", "prompt_field": "question", "completion_field": "answer"}
SENTIMENT = {
    "type": "template",
    "user": "Is this review positive or negative?\n\n{{ sentence }}",
    "assistant": "{{ 'positive' if label == '1' else 'negative' }}",
}
MULTIPLE_CHOICE = {
    "type": "prompt_completion", "prompt_field": "input", "completion_field": "output",
}  # fmt: skip
SETS: dict[str, dict[str, Any]] = {
    "gsm8k": {
        "train": {"path": "gsm8k/train.jsonl", "format": GSM8K},
        "evaluation": {"path": "gsm8k/test.jsonl", "format": GSM8K},
    },
    "sst2": {
        name: {"path": f"sst2/{file}.tsv", "columns": ["sentence", "label"], "format": SENTIMENT}
        for name, file in (("train", "train"), ("evaluation", "dev"))
    },
    "mmlu": {"train": {"path": "mmlu/zero_shot_val.jsonl", "format": MULTIPLE_CHOICE}},
    "wikitext2": {"train": {"path": "wikitext2/valid.txt", "format": {"type": "text"}}},
    "alpaca": {"train": {"path": "alpaca/alpaca_en_demo.json", "format": {"type": "alpaca"}}},
    "toolcall": {
        "train": {
            "path": "toolcall/glaive_toolcall_en_demo.json",
            "format": {"type": "sharegpt"},
        }
    },
    "preference": {
        "train": {"path": "preference/dpo_en_demo.json", "format": {"type": "preference"}}
    },
    "labels": {
        name: {
            "path": f"sst2/{file}.tsv",
            "columns": ["sentence", "label"],
            "format": {"type": "labelled", "field": "sentence"},
        }
        for name, file in (("train", "train"), ("evaluation", "dev"))
    },
}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "preference": {"type": "dpo"},
    "labels": {"type": "classify", "labels": ["negative", "positive"]},
}
ROWS = {
    "gsm8k": 7473, "sst2": 6920, "mmlu": 1531, "wikitext2": 2461,
    "alpaca": 999, "toolcall": 300, "preference": 300, "labels": 6920,
}  # fmt: skip
ANSWERS = {
    "gsm8k": "Natalia sold 48/2 = <<48/2=24>>24 clips in May.",
    "sst2": "positive",
    "mmlu": "A",
    "wikitext2": " = Homarus gammarus = ",
    "alpaca": "Making crepes is an easy and delicious process!",
    "toolcall": "Of course! I can help you with that.",
    "preference": "That sounds like a fun and engaging idea!",
    "labels": "<|",
}
"""The beginning of the first row's supervised text."""

pytestmark = [
    pytest.mark.slow,
    needs_data,
    needs_model,
]


@pytest.fixture(scope="module")
def demo_model() -> Path:
    """The demo model, unpacked."""
    return BaseModelConfig(path=str(MODEL)).locate()


@pytest.fixture(scope="module")
def random_model(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with random weights and the demo model's tokenizer."""
    tokenizer = load_tokenizer(demo_model)
    folder = tmp_path_factory.mktemp("random") / "model"
    save_tiny_model(
        folder, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, pad_token_id=0
    )
    tokenizer.save_pretrained(folder)
    return folder


def write_recipe(folder: Path, name: str, model: Path, *, limit: int | None, **data: Any) -> Path:
    sides = {
        side: {**source, "path": str(DATA / source["path"]), "limit": limit}
        for side, source in SETS[name].items()
    }
    if name == "toolcall":
        # The demo model's own template leaves tools out, so these rows would be refused with it.
        data["chat_template"] = str(ROOT / "configs/chat_templates/chatml-tools.jinja")
    document = {
        "model": {"path": str(model)},
        "data": {**sides, **data},
        "adapter": {"type": "lora", "r": 4, "alpha": 8},
        "objective": OBJECTIVES.get(name, {"type": "supervised"}),
        "training": {"batch_size": 4, "micro_batch_size": 4, "gradient_checkpointing": False},
        "output": {"dir": str(folder / "run")},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", SETS)
def test_all_rows_of_a_set_are_previewed(name: str, demo_model: Path, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, name, demo_model, limit=None, max_length=16384)
    found = preview(load_recipe(path).recipe)
    training, *_ = sides = found.views(1)
    [source] = training.sources
    assert (source.num_read, source.num_bad, source.num_dropped) == (ROWS[name], 0, 0)
    assert training.audit.total.num_rows == ROWS[name]
    for side in sides:
        counts = {finding.what: finding.count for finding in side.findings}
        assert counts["rows with nothing to learn"] == 0
        if name != "labels":
            assert counts["turns that end in no stop token"] == 0
            assert counts["rows whose prompt differs in generation"] == 0
        assert counts["rows that begin with two BOS tokens"] == 0
    supervised = [
        "".join(span.text for span in one.spans if span.is_supervised) for one in source.samples
    ]
    assert supervised[0].startswith(ANSWERS[name])
    assert supervised[0].endswith("<|im_end|>")
    assert [one.answer for one in source.samples] == (
        ["chosen", "rejected"] if name == "preference" else [None]
    )
    assert found.text(1, colour=False).startswith("⟦supervised⟧")
    assert len(list(found.rows(2))) == 2 * len(sides) * len(source.samples)


@pytest.mark.parametrize("name", SETS)
def test_three_steps_are_trained_on_each_set(name: str, random_model: Path, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, name, random_model, limit=64, max_length=256, max_lost=1)
    train(load_recipe(path, ["training.max_steps=3"]).recipe)
    assert len(losses(tmp_path)) == 3
    # The loss of a uniform distribution: over the vocabulary, or over two answers or labels.
    uniform = math.log(2 if name in OBJECTIVES else 49152)
    assert losses(tmp_path)[0] == pytest.approx(uniform, abs=1.5)


@pytest.mark.parametrize("name", SETS)
def test_the_demo_model_begins_to_learn_each_set(
    name: str, demo_model: Path, tmp_path: Path
) -> None:
    # A pair is lost when one of its answers is cut; few of these are short.
    length = 512 if name == "preference" else 256
    path = write_recipe(tmp_path, name, demo_model, limit=8, max_length=length, max_lost=1)
    overrides = ["training.max_steps=2", "optimizer.learning_rate=1e-4", "data.evaluation=null"]
    train(load_recipe(path, overrides).recipe)
    assert len(losses(tmp_path)) == 2
    assert max(losses(tmp_path)) < 5


def losses(folder: Path) -> list[float]:
    lines = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row["loss"] for row in map(json.loads, lines) if "loss" in row]
