"""Test the search for changes with which a recipe fits, and `auto`."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from qlora_cli.data.prepared.cache import read_data
from qlora_cli.distributed.devices import find_target
from qlora_cli.errors import DataError, RecipeError
from qlora_cli.loop import run_data
from qlora_cli.plan.plan import plan
from qlora_cli.plan.report import OTHER_DEVICES, Fits, MicroBatch, PlanReport
from qlora_cli.plan.shrink_to_fit import _different, _levels, with_changes
from qlora_cli.plan.text import plan_text, set_line
from qlora_cli.recipe.load import LoadedRecipe
from qlora_cli.recipe.schema import Recipe


@pytest.mark.slow
def test_fit_finds_the_least_harmful_change(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    # Two layers of the size of a 1B model's: they take more than a process does without them.
    LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=2, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=32000,
    ).save_pretrained(tmp_path)  # fmt: skip
    recipe = tiny_recipe(
        model={"path": str(tmp_path)},
        data={"train": {"path": "nowhere.jsonl"}, "evaluation": None, "max_length": 512},
        training={"batch_size": 8, "micro_batch_size": 8, "precision": "bf16"},
    )

    def changes(device: str) -> dict[str, Any]:
        report = plan(recipe, device=device, fit=True)
        assert report.fits.verdict == "yes"
        found: dict[str, Any] = report.to_json()["changes"]
        return found

    assert changes("80GiB") == {}
    assert set(changes("1.7GiB")) == {"training.micro_batch_size"}
    much_less = changes("1.5GiB")
    assert much_less["training.gradient_checkpointing"] is True
    assert much_less["quantization.type"] == "int8"
    assert not {"optimizer.type", "data.max_length"} & set(much_less)


@pytest.mark.parametrize(
    ("optimizer", "on_card", "on_cpu"),
    [
        ("adamw", "paged_adamw_8bit", "adamw_8bit"),
        ("adamw_8bit", "paged_adamw_8bit", None),
        ("paged_adamw_32bit", "paged_adamw_8bit", "paged_adamw_8bit"),
        ("paged_adamw_8bit", None, None),
        ("lion", "paged_lion_8bit", "lion_8bit"),
        ("lion_8bit", "paged_lion_8bit", None),
        ("ademamix", "paged_ademamix_8bit", "ademamix_8bit"),
        ("adafactor", None, None),
        ("sgd", None, None),
        ("schedule_free_adamw", None, None),
        ("muon", None, None),
    ],
)
def test_fit_keeps_the_optimizer_algorithm(
    tiny_recipe: Callable[..., Recipe], optimizer: str, on_card: str | None, on_cpu: str | None
) -> None:
    recipe = tiny_recipe(optimizer={"type": optimizer})
    for device, wanted in (("T4", on_card), ("cpu", on_cpu)):
        *_, last = _levels(recipe, find_target(device))
        assert last.get("optimizer.type") == wanted


def test_printed_set_line_reproduces_the_fitted_recipe(
    load: Callable[..., LoadedRecipe], minimal: str
) -> None:
    text = f"""{minimal}
optimizer:
  type: adamw
  learning_rate: 1e-5
  weight_decay: 0.1
  eps: 1e-9
  beta2: 0.95
  groups: [{{match: "it's|lora_A$", learning_rate: 3e-5}}]
"""
    recipe = load(text).recipe
    wanted = {
        "training.gradient_checkpointing": True,
        "quantization.type": "nf4",
        "optimizer.type": "paged_adamw_8bit",
        "training.micro_batch_size": 1,
    }
    options = shlex.split(set_line(_different(recipe, wanted)))
    assert options[::2] == ["--set"] * (len(options) // 2)
    found = load(text, *options[1::2]).recipe
    assert found == with_changes(recipe, wanted)
    assert found.optimizer.learning_rate == 1e-5
    assert found.optimizer.groups == recipe.optimizer.groups
    assert _different(recipe, {"optimizer.type": "adamw"}) == {}


@pytest.mark.slow
def test_fit_does_not_lose_more_answers_than_allowed(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    turns = [{"role": "user", "content": "a" * 600}, {"role": "assistant", "content": "b"}]
    path = tmp_path / "long.jsonl"
    path.write_text((json.dumps({"messages": turns}) + "\n") * 4, encoding="utf-8")
    data = {"train": {"path": str(path)}, "evaluation": None, "max_length": 1024}
    report = plan(tiny_recipe(data=data, training={"precision": "auto"}), device="0.1GiB", fit=True)
    assert report.changes is None
    assert report.rows.micro_batches[0][0][1] > 600
    assert report.to_json()["no_shorter"].startswith("data.max_length 512: ")
    assert "rows cannot be shorter: data.max_length 512" in plan_text(report)
    # What the recipe itself loses is an error, as it is in a run.
    with pytest.raises(DataError, match="answers are lost"):
        plan(tiny_recipe(data={**data, "max_length": 256}), device="0.1GiB", fit=True)


def test_fit_needs_the_memory_size_of_the_device(tiny_recipe: Callable[..., Recipe]) -> None:
    if torch.cuda.is_available():
        pytest.skip("the memory of the card here is known")
    with pytest.raises(
        RecipeError, match="size of the device is unknown: there is no GPU"
    ) as caught:
        plan(tiny_recipe(), device="cuda", fit=True)
    assert caught.value.hint == OTHER_DEVICES


def test_auto_is_the_largest_micro_batch_that_fits(tiny_recipe: Callable[..., Recipe]) -> None:
    def planned(size: int | str, device: str) -> PlanReport:
        recipe = tiny_recipe(
            data={"train": {"path": "nowhere.jsonl"}, "evaluation": None, "max_length": 512},
            training={"batch_size": 12, "micro_batch_size": size},
        )
        return plan(recipe, device=device)

    four = planned(4, "80GiB")
    report = planned("auto", f"{four.process.high / 2**30 + 1e-5:.6f}GiB")
    assert report.micro_batch == MicroBatch(rows=4, is_auto=True)
    assert report.fits.verdict == "yes"
    assert report.rows == four.rows
    assert report.peak.bytes == four.peak.bytes
    assert "micro_batch_size: auto is 4" in plan_text(report)
    verdict = plan_text(replace(report, fits=Fits("unknown", None))).splitlines()[0]
    assert verdict == f"fits: unknown, because there is no GPU here; {OTHER_DEVICES}"
    assert planned("auto", "0.1GiB").micro_batch.rows == 1
    assert planned("auto", "80GiB").micro_batch.rows == 12


@pytest.mark.quick_every(2)
@pytest.mark.parametrize("fit", [False, True])
@pytest.mark.parametrize("size", ["auto", 2])
def test_plan_reads_the_data_once(
    tiny_recipe: Callable[..., Recipe],
    monkeypatch: pytest.MonkeyPatch,
    size: str | int,
    fit: bool,
) -> None:
    reads = []

    def read(name: str, *arguments: Any, **settings: Any) -> Any:
        reads.append(name)
        return read_data(name, *arguments, **settings)

    monkeypatch.setattr(run_data, "read_data", read)
    recipe = tiny_recipe(training={"batch_size": 4, "micro_batch_size": size})
    plan(recipe, device="24GiB", fit=fit)
    assert reads == ["training", "evaluation"]


def test_auto_needs_the_memory_size_of_the_device(tiny_recipe: Callable[..., Recipe]) -> None:
    if torch.cuda.is_available():
        pytest.skip("the memory of the card here is known")
    with pytest.raises(RecipeError, match="auto needs the memory size"):
        plan(tiny_recipe(training={"micro_batch_size": "auto"}), device="cuda")
