"""Test benchmarks/addition_order: three trainings of one adapter, and their report."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.addition_order import __main__ as program
from benchmarks.addition_order.page import Cell, as_markdown, differences, whole_settings
from benchmarks.addition_order.training import BASES, build, copy_adapter, share_kept
from qlora_cli.objectives.supervised import TokenLoss
from qlora_cli.types import Batch

CELL = Cell("tiny", "nf4", 1e-2, 4, steps=2, rows_per_step=2, max_length=96, seed=0)


def adapter(way: str, cell: Cell, path: Path) -> dict[str, torch.Tensor]:
    model = build(way, cell, path)
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("base", list(BASES))
def test_all_variants_begin_with_the_same_adapter(tiny_model: Path, base: str) -> None:
    cell = replace(CELL, base=base)
    expected, *others = (adapter(way, cell, tiny_model) for way in ("float32", "ours", "peft"))
    assert len(expected) == 28
    for found in others:
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_the_reference_multiplies_by_the_values_that_the_others_do(tiny_model: Path) -> None:
    from qlora_cli.kernels.lora_linear import base_weight

    reference = build("float32", CELL, tiny_model)
    others = dict(build("ours", CELL, tiny_model).named_modules())
    layers = {n: m for n, m in reference.named_modules() if hasattr(m, "lora_A")}
    assert len(layers) == 14
    for name, layer in layers.items():
        assert layer.base_layer.weight.dtype == torch.float32
        held = base_weight(others[name].base_layer, torch.bfloat16)
        assert torch.equal(layer.base_layer.weight, held.float())


def test_a_small_update_reaches_the_output_in_our_order_and_not_in_pefts(
    tiny_model: Path,
) -> None:
    torch.manual_seed(0)
    batch = Batch(torch.randint(0, 250, (1, 64)), None, torch.randint(0, 250, (1, 64)), (64,))
    kept = {}
    for way in ("ours", "peft"):
        model = build(way, CELL, tiny_model)
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=1e-4)
        kept[way] = share_kept(TokenLoss(model, torch.bfloat16), batch)
    assert kept["ours"] == pytest.approx(1, abs=0.1)
    assert kept["peft"] < 0.5


def test_an_adapter_is_copied(tiny_model: Path) -> None:
    source, target = build("ours", CELL, tiny_model), build("float32", CELL, tiny_model)
    for parameter in source.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    copy_adapter(source, target)
    found = {n: p for n, p in target.named_parameters() if p.requires_grad}
    for name, parameter in source.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter, found[name])


def measured(way: str, losses: list[float], held_out: float, **changes: Any) -> dict[str, Any]:
    cell = {**vars(CELL), **changes}
    record = {"way": way, "cell": cell, "losses": losses, "held_out_own": held_out}
    return record | {"held_out_float32": held_out, "kept": {"1": 0.25, "2": 0.5}}


def report(*runs: dict[str, Any]) -> dict[str, Any]:
    head = {"processor": "a processor", "threads": 1, "versions": {}, "commit": "c", "command": "r"}
    base = {"seed": 0, "steps": 0, "learning_rate": 0.0, "r": 1}
    return {**head, "runs": [measured("untrained", [], 3.0, **base), *runs]}


def test_the_page_has_each_setting_once_with_the_spread_of_its_seeds() -> None:
    runs = [
        measured(way, losses, held_out + 0.1 * seed, seed=seed)
        for seed in (0, 1)
        for way, losses, held_out in (
            ("float32", [2.0, 1.0], 1.5),
            ("ours", [2.0, 1.01], 1.5),
            ("peft", [2.0, 1.1 + 0.1 * seed], 1.6 + 0.1 * seed),
        )
    ]
    page = as_markdown(report(*runs))
    assert "| tiny | nf4 | 0.01 | 4 | 2 | 3.0000 | 1.5500 (1.5000 to 1.6000) |" in page
    assert "| +0.1500 (+0.1000 to +0.2000) |" in page
    assert "| 2 x 2 | 2 | 0.50 (0.50 to 0.50) | 1.00 |" in page


def test_a_seed_without_every_variant_is_not_on_the_page() -> None:
    half = [measured("float32", [2.0, 1.0], 1.5), measured("ours", [2.0, 1.0], 1.5)]
    assert whole_settings(report(*half)) == []
    assert len(whole_settings(report(*half, measured("peft", [2.0, 1.0], 1.5)))) == 1


def test_differences_are_in_percent_of_the_reference() -> None:
    found = differences({"losses": [2.02, 0.99]}, {"losses": [2.0, 1.0]})
    assert found == pytest.approx([1.0, -1.0])


def test_existing_measurements_are_reused(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"question": f"say {word}", "answer": word * 3} for word in ("ab", "cd", "ef", "gh")]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    for name in ("train.jsonl", "test.jsonl"):
        (tmp_path / name).write_text(text, encoding="utf-8")
    output = tmp_path / "found.json"
    sizes = "--steps 2 --rows-per-step 2 --max-length 96 --held-out 3 --seeds 0 --ranks 4"
    words = ["--data", str(tmp_path), "--model", f"tiny={tiny_model}", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["x", *words, "--bases", "none", *sizes.split()])
    program.main()
    first = json.loads(output.read_text(encoding="utf-8"))
    assert [run["way"] for run in first["runs"]] == ["untrained", "float32", "ours", "peft"]
    losses = [run["losses"] for run in first["runs"][1:]]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    first["runs"][3]["seconds"] = -1  # what a second measurement would not give
    output.write_text(json.dumps(first), encoding="utf-8")
    program.main()
    assert json.loads(output.read_text(encoding="utf-8"))["runs"] == first["runs"]
    assert "| tiny | none | 0.0002 | 4 |" in output.with_suffix(".md").read_text(encoding="utf-8")
