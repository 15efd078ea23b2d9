"""A run that is stopped after any step and resumed equals the uninterrupted run bit for bit."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file

from qlora_cli.models.quantization import QuantizationConfig
from qlora_cli.recipe.schema import Recipe
from qlora_cli.runs.run_folder import RunFolder
from qlora_cli.train.train import train
from tests.conftest import each_optimizer, mostly_slow


def variants(union: Any) -> list[str]:
    """List the types of a section of the recipe, so that new ones are tested too."""
    return [part.model_fields["type"].default for part in get_args(get_args(union)[0])]


OPTIMIZERS = each_optimizer()
QUANTIZATIONS = variants(QuantizationConfig)
CLOCKS = {"tokens_per_second", "peak_memory_bytes"}

# Half of its factors have more than 4096 weights: below that bitsandbytes keeps 32-bit states.
WIDE = {"type": "lora", "r": 80, "alpha": 8, "dropout": 0.1}


def manifests(run: Path) -> dict[int, str]:
    """Read the checksums of every checkpoint: weights, optimizer and random states."""
    return {
        int(path.parent.name[5:]): path.read_text(encoding="utf-8")
        for path in (run / "checkpoints").glob("step-*/manifest.json")
    }


def logged(run: Path) -> list[dict[str, float]]:
    """Read all metrics except throughput and memory."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [
        {name: value for name, value in json.loads(line).items() if name not in CLOCKS}
        for line in lines
    ]


def check_resumes(recipe: Recipe, stops: list[int], *, use_cache: bool = True) -> None:
    """Run it uninterrupted, then resume from each of `stops` as after a kill there."""
    run = Path(recipe.output.dir)
    record = train(recipe)
    assert record["steps"] > max(stops)
    expected, metrics = manifests(run), logged(run)
    weights = [file.read_bytes() for file in sorted((run / "last").glob("*.safetensors"))]
    assert len(expected) == record["steps"], "each step was saved"
    assert weights
    for stop in sorted(stops, reverse=True):
        shutil.rmtree(run / "last")
        before = {**record["checkpoint_seconds"], str(stop): 1000.0}
        RunFolder(run).update_record(checkpoint_seconds=before)
        again = train(recipe, resume=str(stop), use_cache=use_cache)
        assert 1000 < again["seconds"] < 1600, "the seconds before the resume count"
        assert manifests(run) == expected, f"after going on from step {stop}"
        assert logged(run) == metrics, f"after going on from step {stop}"
        again = [file.read_bytes() for file in sorted((run / "last").glob("*.safetensors"))]
        assert again == weights, f"after going on from step {stop}"


@pytest.fixture
def make(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> Callable[..., Recipe]:
    """A recipe with dropout and accumulation that saves each step."""

    def recipe(**sections: Any) -> Recipe:
        training = {
            "max_steps": 5, "save_every": 1, "eval_every": 2, **sections.pop("training", {})
        }  # fmt: skip
        adapter = sections.pop("adapter", {"dropout": 0.1})
        output = {"dir": str(tmp_path / "run"), "keep_checkpoints": 1000}
        return tiny_recipe(training=training, adapter=adapter, output=output, **sections)

    return recipe


@pytest.mark.quick_every(2)
@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize(
    "optimizer", mostly_slow(OPTIMIZERS, OPTIMIZERS[0], OPTIMIZERS[3]), ids=lambda one: one.type
)
def test_each_optimizer_resumes_exactly_in_4_bit_and_unquantized(
    make: Callable[..., Recipe], optimizer: Any, quantization: str
) -> None:
    recipe = make(
        adapter=WIDE,
        optimizer={
            "type": optimizer.type,
            "learning_rate": 1e-2,
            "weight_decay": 0.1,
            "lora_plus_ratio": 2,
        },
        quantization={"type": quantization},
        schedule={
            "type": "constant" if optimizer.is_schedule_free else "cosine",
            "warmup_steps": 2,
        },
    )
    check_resumes(recipe, [1, 3])


@pytest.mark.parametrize("quantization", sorted({*QUANTIZATIONS} - {"nf4", "none"}))
def test_each_other_quantization_resumes_exactly(
    make: Callable[..., Recipe], quantization: str
) -> None:
    check_resumes(make(quantization={"type": quantization}), [2])


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_16_bit_run_resumes_exactly(make: Callable[..., Recipe], precision: str) -> None:
    check_resumes(make(training={"precision": precision}), [2])


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "schedule_free_adamw"])
def test_full_fine_tuning_resumes_exactly(make: Callable[..., Recipe], optimizer: str) -> None:
    settings = {"type": optimizer, "learning_rate": 1e-3}
    check_resumes(make(adapter={"type": "full"}, optimizer=settings), [2])


def test_schedule_free_saves_the_average_and_evaluating_changes_nothing(
    make: Callable[..., Recipe], tmp_path: Path
) -> None:
    def trained(every: int | None) -> tuple[bytes, Path]:
        settings = {"type": "schedule_free_adamw", "learning_rate": 1e-2, "beta1": 0.8}
        recipe = make(optimizer=settings, training={"eval_every": every})
        shutil.rmtree(recipe.output.dir, ignore_errors=True)
        train(recipe)
        file = Path(recipe.output.dir) / "last" / "adapter_model.safetensors"
        return file.read_bytes(), file

    often, _ = trained(1)
    seldom, file = trained(None)
    assert often == seldom

    def total(tensors: dict[str, torch.Tensor]) -> float:
        return sum(one.double().sum().item() for one in tensors.values())

    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000005"
    states = load_file(checkpoint / "state.safetensors")
    point = total(load_file(checkpoint / "trained.safetensors"))
    steps = total({name: one for name, one in states.items() if name.endswith("/z")})
    # x = (y - (1 - beta1) z) / beta1, by the paper's equation for y
    average = total(load_file(file))
    assert average == pytest.approx((point - 0.2 * steps) / 0.8, rel=1e-5)
    assert abs(average - point) > 1e-3 * abs(point)


def test_a_run_with_recomputed_activations_resumes_exactly(make: Callable[..., Recipe]) -> None:
    check_resumes(make(training={"gradient_checkpointing": True}), [2])


@pytest.mark.slow
def test_a_run_resumes_exactly_in_the_middle_and_at_the_end_of_an_epoch(
    make: Callable[..., Recipe],
) -> None:
    # 16 rows in steps of 6 (micro-batches of 2): a pass ends inside of a step, and the third pass
    # in a step that is cut short.
    settings = {"max_steps": None, "epochs": 2.8, "batch_size": 6, "micro_batch_size": 2}
    check_resumes(make(training=settings), [1, 2, 3, 5, 7])


def test_a_run_resumes_exactly_at_the_boundary_of_an_epoch(make: Callable[..., Recipe]) -> None:
    settings = {"max_steps": None, "epochs": 3, "batch_size": 8, "micro_batch_size": 4}
    check_resumes(make(training=settings), [2, 4, 5])


@pytest.mark.slow
@pytest.mark.parametrize("packing", mostly_slow([False, True], True))
def test_a_run_with_weighted_sources_resumes_exactly_from_rows_prepared_again(
    make: Callable[..., Recipe], tmp_path: Path, tiny_rows: list[dict[str, Any]], packing: bool
) -> None:
    """One source is compressed and shuffled, and read from the disk like a large one."""
    plain, packed = tmp_path / "plain.jsonl", tmp_path / "packed.jsonl.gz"
    lines = [json.dumps(row) + "\n" for row in tiny_rows]
    plain.write_text("".join(lines[:7]), encoding="utf-8")
    with gzip.open(packed, "wt", encoding="utf-8") as file:
        file.writelines(lines[7:])
    sources = [
        {"path": str(plain), "weight": 2.5},
        {"path": str(packed), "weight": 0.7, "shuffle": True, "limit": 8},
    ]
    recipe = make(
        data={"train": sources, "packing": packing, "max_length": 128},
        training={"max_steps": 7, "batch_size": 4, "micro_batch_size": 1},
    )
    check_resumes(recipe, [1, 2, 3, 4, 5, 6], use_cache=False)


def test_an_interruption_does_not_change_the_record(make: Callable[..., Recipe]) -> None:
    recipe = make()
    check_resumes(recipe, [3])
    record = RunFolder(Path(recipe.output.dir)).read_record()
    assert record["status"] == "finished"
    assert record["best"]["value"] == min(
        row["eval_loss"] for row in logged(Path(recipe.output.dir))[1:] if "eval_loss" in row
    )
