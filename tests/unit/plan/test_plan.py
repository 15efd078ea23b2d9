"""Test plans of whole recipes: against a run, and as the command prints them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_cli.plan.plan import plan
from qlora_cli.plan.text import plan_text
from qlora_cli.plan.trace.libraries import load_libraries
from qlora_cli.plan.trace.memory_counter import (
    MemoryCounter,
)
from qlora_cli.recipe.schema import Recipe
from qlora_cli.train.train import train
from tests.conftest import exit_code, output_of
from tests.unit.plan.tiny import RECIPES, WEIGHTS


@pytest.mark.quick_every(3)
@pytest.mark.parametrize("name", ["nf4", "packed", "int8"])
def test_run_takes_the_planned_memory(
    tiny_recipe: Callable[..., Recipe], name: str, tmp_path: Path
) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "a" * n}, {"role": "assistant", "content": "b"}]}
        for n in (60, 50, 40, 30, 20, 10)
    ] + [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b" * 40}]}
    ]
    path = tmp_path / "uneven.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    source = {"path": str(path)}
    changes = RECIPES[name]
    recipe = tiny_recipe(
        **{**changes, "data": {**changes.get("data", {}), "train": source, "evaluation": source}}
    )
    load_libraries()
    report = plan(recipe, device="cpu")
    with MemoryCounter() as count:
        train(recipe)
    real = max(peak.total for peak in count.peaks.values())
    assert report.peak.stage != "packing proof"
    assert report.peak.bytes == pytest.approx(real, rel=1e-2)


def test_memory_by_kind_adds_up_to_the_total(tiny_recipe: Callable[..., Recipe]) -> None:
    missing = {"train": {"path": "nowhere.jsonl"}, "evaluation": None}
    report = plan(tiny_recipe(quantization={"type": "nf4"}, data=missing), device="cpu")
    for memory in report.stages.values():
        assert sum(memory.kinds.values()) == memory.bytes
    kinds = report.stages["step"].kinds
    trained = 4 * report.model.trained
    assert kinds["trained weights"] == kinds["gradients"] == trained == report.adapter_bytes
    assert 2 * trained <= kinds["optimizer states"] <= 2.1 * trained
    # Half a byte for each of the weights in the two layers.
    assert kinds["quantized weights"] == 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64) // 2
    assert kinds["logits and loss"] > 0


def test_plan_reports_host_memory_of_offload(tiny_recipe: Callable[..., Recipe]) -> None:
    recipe = tiny_recipe(
        quantization={"type": "nf4"},
        optimizer={"type": "paged_adamw_8bit"},
        training={"gradient_checkpointing": "offload"},
    )
    report = plan(recipe, device="RTX 4090")
    assert report.to_json()["host"]["inputs_bytes"] > 0
    assert "for offloaded layer inputs" in plan_text(report)
    assert plan(recipe, device="cpu").to_json()["host"] == {}
    assert plan(recipe, device="0.1GiB", fit=True).changes is None  # nothing less is known


def test_large_model_is_planned_from_its_name(tiny_recipe: Callable[..., Recipe]) -> None:
    recipe = tiny_recipe(
        model={"path": "meta-llama/Llama-2-7b-hf"},
        quantization={"type": "nf4"},
        adapter={"type": "lora", "r": 64},
        data={"train": {"path": "nowhere.jsonl"}, "evaluation": None, "max_length": 512},
        training={"gradient_checkpointing": True, "micro_batch_size": 1, "precision": "bf16"},
    )
    report = plan(recipe, device="RTX 4090")
    assert report.model.weights == WEIGHTS["meta-llama/Llama-2-7b-hf"]
    assert report.model.trained == 159_907_840
    assert "not available" in report.rows.from_
    assert report.rows.micro_batches == [[[1, 512], [1, 512]]]
    # 3.238e9 = 224 matrices of 6,476,005,376 weights in four bits.
    assert report.peak.kinds["quantized weights"] == 6_476_005_376 // 2
    assert 6.0 < report.peak.bytes / 2**30 < 7.0
    assert report.fits.verdict == "yes"
    assert report.traced_layers == (2, 3)
    assert plan(recipe, device="6GiB").fits.verdict == "no"


def test_paged_states_are_reported_separately_on_cuda(tiny_recipe: Callable[..., Recipe]) -> None:
    paged = plan(tiny_recipe(optimizer={"type": "paged_adamw_32bit"}), device="24GiB")
    plain = plan(tiny_recipe(optimizer={"type": "adamw"}), device="24GiB")
    assert "optimizer states" not in paged.peak.kinds
    states = plain.stages["step"].kinds["optimizer states"]
    assert paged.stages["step"].paged_bytes == states
    assert plain.stages["step"].bytes - paged.stages["step"].bytes == states


def test_plan_uses_the_largest_batches_of_the_data(
    tiny_recipe: Callable[..., Recipe],
) -> None:
    report = plan(tiny_recipe(), device="cpu")
    assert report.rows.from_ == "the data"
    (rows, longest), (_, second) = report.rows.micro_batches[0]
    assert rows == 1  # two examples, end to end
    assert 2 * 20 < second <= longest < 2 * 96
    assert report.rows.steps == 4
    assert report.rows.tokens is not None
    assert report.rows.tokens > 4 * 4 * 20


def test_command_prints_a_plan(
    write_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_recipe(quantization={"type": "nf4"})
    report = output_of(capsys, "plan", path, "--device", "T4")
    assert report["device"]["name"] == "T4"
    assert report["peak"]["bytes"] == max(stage["bytes"] for stage in report["stages"].values())
    assert exit_code("plan", path, "--device", "T4") == 0
    text = capsys.readouterr().out
    assert "at the peak" in text
    assert "fits: yes" in text
    assert json.dumps(report["model"]["path"])[1:-1] in text


@pytest.mark.slow
def test_table_compares_methods(
    write_recipe: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("qlora_cli.plan.plan.LENGTHS", (64, 128))
    # Groups that only LoRA has are dropped for the other methods.
    group = {"match": "lora_A", "learning_rate": 1e-3}
    recipe = write_recipe(optimizer={"type": "adamw", "lora_plus_ratio": 16, "groups": [group]})
    report = output_of(capsys, "plan", recipe, "--device", "24GiB", "--table")
    assert list(report["methods"]) == ["full", "LoRA", "8-bit LoRA", "QLoRA", "bottleneck"]
    for cells in report["methods"].values():
        sizes = [cell["tensors"] for cell in cells.values()]
        assert len(sizes) == 2
        assert sizes == sorted(sizes)
    shortest = {method: cells["64"]["tensors"] for method, cells in report["methods"].items()}
    assert shortest["full"] > shortest["LoRA"] > shortest["QLoRA"] > 0


@pytest.mark.parametrize("option", ["--fit", "--gpus", "--html"])
def test_table_refuses_options_that_it_would_ignore(
    write_recipe: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    option: str,
) -> None:
    values: dict[str, list[object]] = {"--gpus": [2], "--html": [tmp_path / "plan.html"]}
    value = values.get(option, [])
    assert exit_code("plan", write_recipe(), "--device", "24GiB", "--table", option, *value) == 2
    assert f"{option} and --table: " in capsys.readouterr().err
