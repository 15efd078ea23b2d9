"""Try the largest batches first, and leave the run as it was."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers.models.llama.modeling_llama import LlamaMLP

from qlora_cli.common.formatting import size_text
from qlora_cli.data.batching.collate import full_batch
from qlora_cli.data.prepared.cache import read_data
from qlora_cli.errors import OutOfMemory
from qlora_cli.loop import run_data
from qlora_cli.loop.fast_path import ComputeOptions
from qlora_cli.loop.run_data import read_recipe_data
from qlora_cli.loop.setup import assemble
from qlora_cli.plan.dry_run import FixedBatches, SingleProcess
from qlora_cli.plan.plan import plan
from qlora_cli.plan.rows import PlanRows
from qlora_cli.recipe.load import load_recipe
from qlora_cli.recipe.schema import Recipe
from qlora_cli.runs.run_folder import RunFolder
from qlora_cli.train import preflight
from qlora_cli.train.preflight import memory_summary, resolve_auto, try_largest
from qlora_cli.train.train import train
from tests.conftest import each_optimizer, mostly_slow

LONG: dict[str, Any] = {"training": {"max_steps": 40, "log_every": 10}}


@pytest.fixture
def run(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> Callable[..., Path]:
    def run(name: str, **sections: Any) -> Path:
        folder = tmp_path / name
        train(tiny_recipe(**{**LONG, **sections}, output={"dir": str(folder)}))
        return folder

    return run


@pytest.mark.parametrize(
    "optimizer",
    mostly_slow(["adamw", "adamw_8bit", "ademamix", "schedule_free_adamw", "muon"], "muon"),
)
def test_a_run_is_the_same_with_its_largest_batches_tried_first(
    run: Callable[..., Path], optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sections = {"optimizer": {"type": optimizer}, "adapter": {"dropout": 0.2}}
    tried = run("tried", **sections)
    monkeypatch.setattr(preflight, "_MAX_SHARE", 0.0)
    plain = run("plain", **sections)
    weights = [load_file(one / "last" / "adapter_model.safetensors") for one in (tried, plain)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])
    records = [json.loads((one / "run.json").read_text()) for one in (tried, plain)]
    assert records[0]["tried_memory_bytes"] > 0
    assert "tried_memory_bytes" not in records[1]


def test_auto_is_resolved_once_and_recorded(
    run: Callable[..., Path],
    tiny_recipe: Callable[..., Recipe],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    auto = {"training": {**LONG["training"], "batch_size": 4, "micro_batch_size": "auto"}}
    free = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free._replace(available=2**20))
    with caplog.at_level(logging.INFO, "qlora"):
        folder = run("auto", **auto)
    told = [line for line in caplog.messages if "micro_batch_size: auto is 1" in line]
    assert len(told) == 1
    record = json.loads((folder / "run.json").read_text())
    assert record["is_micro_batch_auto"]
    assert record["recipe"]["training"]["micro_batch_size"] == 1
    assert load_recipe(folder / "recipe.yaml").recipe.training.micro_batch_size == 1

    monkeypatch.setattr(psutil, "virtual_memory", lambda: free._replace(available=2**40))
    recipe = tiny_recipe(**auto)
    data, world = read_recipe_data(recipe), SingleProcess()
    assert resolve_auto(recipe, data, world, None).training.micro_batch_size == 4
    assert resolve_auto(recipe, data, world, RunFolder(folder)).training.micro_batch_size == 1


def test_the_search_for_auto_reads_the_data_once_and_keeps_no_cache_with_no_cache(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    reads = []

    def read(name: str, *arguments: Any, **settings: Any) -> Any:
        reads.append((name, settings))
        return read_data(name, *arguments, **settings)

    monkeypatch.setattr(run_data, "read_data", read)
    recipe = tiny_recipe(training={"batch_size": 4, "micro_batch_size": "auto"})
    train(recipe, use_cache=False)
    assert [name for name, _ in reads] == ["training", "evaluation"]
    assert not any(settings["use_cache"] for _, settings in reads)
    assert not (tmp_path / "cache" / "prepared").exists()


def test_the_preflight_uses_the_planned_memory(
    run: Callable[..., Path],
    tiny_recipe: Callable[..., Recipe],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(preflight, "_MIN_WEIGHTS", 0)
    record = json.loads((run("planned") / "run.json").read_text())
    planned, tried = record["planned_memory_bytes"], record["tried_memory_bytes"]
    report = plan(tiny_recipe(**LONG), device="cpu")
    assert planned == report.peak.bytes
    steps = max(report.stages[name].bytes for name in ("step", "evaluation"))
    assert record["planned_step_bytes"] == steps
    assert tried == pytest.approx(steps, rel=2e-2)
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="qlora"):
        again = run("again")
    lines = (again / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[0])["planned_memory_bytes"] == planned
    begun = next(line for line in caplog.messages if line.startswith("plan: tensors take"))
    assert size_text(planned) in begun
    ended = caplog.messages[-1]
    took = json.loads((again / "run.json").read_text())["peak_memory_bytes"]
    low, high = (size_text(end) for end in (report.process.low, report.process.high))
    assert f"the process took {size_text(took)} at its peak (planned {low} to {high})" in ended
    assert f"of tensors (planned {size_text(steps)})" in ended


def test_on_a_gpu_the_tensors_are_compared() -> None:
    memory = {"planned_memory_bytes": 2**20, "tried_memory_bytes": 3 * 2**20}
    assert memory_summary(memory, 2**21, is_resident=False) == (
        "tensors took 2.0 MiB at their peak (planned 1.0 MiB); the largest batches took 3.0 MiB of "
        "tensors"
    )


def test_a_run_with_an_untraceable_model_logs_this_and_continues(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(preflight, "_MIN_WEIGHTS", 0)
    plain = LlamaMLP.forward

    def forward(self: LlamaMLP, rows: torch.Tensor) -> torch.Tensor:
        return plain(self, rows) if rows.isfinite().all() else rows

    monkeypatch.setattr(LlamaMLP, "forward", forward)
    with caplog.at_level(logging.INFO, logger="qlora"):
        folder = run("untraceable", training={**LONG["training"], "kernels": "plain"})
    reported = next(line for line in caplog.messages if line.startswith("no plan: "))
    assert "in LlamaMLP, it branches on values that it has computed" in reported
    record = json.loads((folder / "run.json").read_text())
    assert record["tried_memory_bytes"] > 0
    assert "planned_memory_bytes" not in record


def test_out_of_memory_in_the_preflight_ends_the_run_with_advice(
    tiny_recipe: Callable[..., Recipe],
) -> None:
    recipe = tiny_recipe()
    model = recipe.adapter.attach(
        recipe.model.load(recipe.quantization.load_options(torch.float32), torch.device("cpu"))
    )
    setup = assemble(
        recipe,
        model.get_base_model(),
        model,
        ComputeOptions(torch.float32, "plain"),
        FixedBatches([]),
        SingleProcess(),
        max_steps=1,
    )
    before = {name: p.clone() for name, p in model.named_parameters()}

    def end(*_: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 1 byte")

    rows = PlanRows([[full_batch(1, 16, padding_free=False)]], None, 1, 1, "here", 16)
    model.get_input_embeddings().register_forward_hook(end)
    with pytest.raises(OutOfMemory, match="1x16 tokens") as caught:
        try_largest(setup, rows, is_counted=True)
    assert "--fit" in (caught.value.hint or "")
    assert not setup.optimizer.state
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())


def test_a_short_run_has_no_preflight(
    tiny_recipe: Callable[..., Recipe], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="qlora"):
        record = train(tiny_recipe())
    assert "tried_memory_bytes" not in record
    assert "largest batches" not in caplog.text


@pytest.mark.parametrize("config", each_optimizer(), ids=lambda config: config.type)
def test_making_the_optimizer_states_does_not_change_weights(config: Any) -> None:
    torch.manual_seed(0)
    weights = {
        "model.layers.0.a.weight": nn.Parameter(torch.randn(32, 16)),
        "norm.weight": nn.Parameter(torch.randn(16)),
    }
    optimizer = config.model_copy(update={"weight_decay": 0.1}).build(
        weights.items(), torch.device("cpu")
    )
    for weight in weights.values():
        weight.grad = torch.ones_like(weight)
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    preflight._update(optimizer)
    assert optimizer.state
    assert all(torch.equal(weights[name], before[name]) for name in weights)
