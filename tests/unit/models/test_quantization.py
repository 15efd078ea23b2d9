from pathlib import Path
from typing import Any, get_args

import bitsandbytes.functional as bnb_functional
import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt

from qlora_cli.adapters import LoRA
from qlora_cli.errors import ModelError
from qlora_cli.models.base import BaseModelConfig, start_checkpointing
from qlora_cli.models.quantization import FourBit, Int8, QuantizationConfig, Unquantized
from qlora_cli.models.report import (
    count_base_weights,
    count_trained_weights,
    refuse_mostly_unquantized,
)

CPU = torch.device("cpu")
INPUT = torch.arange(1, 13)[None]
KINDS = {
    "nf4": FourBit(),
    "nf4-single": FourBit(double_quant=False),
    "nf4-bf16-storage": FourBit(quant_storage="bfloat16"),
    "fp4": FourBit(type="fp4"),
    "int8": Int8(),
    "int8-no-outliers": Int8(outlier_threshold=0),
    "none": Unquantized(),
}
each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def load(folder: Path, kind: Any, dtype: torch.dtype = torch.float32) -> Any:
    return BaseModelConfig(path=str(folder)).load(kind.load_options(dtype), CPU)


def test_every_class_of_the_union_is_under_contract() -> None:
    classes = get_args(get_args(QuantizationConfig)[0])
    new = [one.__name__ for one in classes if one not in map(type, KINDS.values())]
    assert not new, f"add {', '.join(new)} to KINDS, with each setting that changes the weights"


@each_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_compute_and_model_dtype_agree_and_nothing_is_upcast(tiny_model, kind, dtype) -> None:
    model = load(tiny_model, kind, dtype)
    floating = {p.dtype for n, p in model.named_parameters() if "embed" in n or "norm" in n}
    assert floating == {dtype}
    for module in model.modules():
        if isinstance(module, Linear4bit):
            assert module.compute_dtype == dtype


def test_explicit_dtypes_are_used(tiny_model: Path) -> None:
    model = load(tiny_model, FourBit(compute_dtype="float32"), torch.bfloat16)
    assert model.model.layers[0].mlp.up_proj.compute_dtype == torch.float32
    model = load(tiny_model, Unquantized(dtype="float16"), torch.bfloat16)
    assert model.dtype == torch.float16


@each_kind
def test_training_through_it_reaches_every_adapter(tiny_model: Path, kind: Any) -> None:
    model = load(tiny_model, kind)
    adapted = LoRA(r=4).attach(model)
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):  # B first, then A
        optimizer.zero_grad()
        adapted(input_ids=INPUT, labels=INPUT).loss.backward()
        optimizer.step()
    gradients = [p.grad for p in adapted.parameters() if p.requires_grad]
    assert gradients
    assert all(g is not None and g.isfinite().all() and g.abs().max() > 0 for g in gradients)


@each_kind
def test_checkpointing_changes_no_gradient(tiny_model: Path, kind: Any) -> None:
    found = []
    for is_checkpointed in (False, True):
        model = load(tiny_model, kind)
        torch.manual_seed(0)
        adapted = LoRA(r=4).attach(model)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        if is_checkpointed:
            start_checkpointing(model)
        adapted(input_ids=INPUT, labels=INPUT).loss.backward()
        found.append([p.grad for p in adapted.parameters() if p.requires_grad])
    for plain, checkpointed in zip(*found, strict=True):
        torch.testing.assert_close(plain, checkpointed, rtol=1e-6, atol=1e-6)
        assert plain.abs().max() > 0


@each_kind
def test_restored_weights_are_those_that_the_quantized_ones_stand_for(tiny_model, kind) -> None:
    model = load(tiny_model, kind)
    expected = {}
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            expected[name] = bnb_functional.dequantize_4bit(
                module.weight.data, module.weight.quant_state
            ).float()
        elif isinstance(module, Linear8bitLt):
            expected[name] = module.weight.data * module.weight.SCB[:, None] / 127
        elif isinstance(module, torch.nn.Linear):
            expected[name] = module.weight.detach().clone()
    restored = kind.restore(model)
    assert len(expected) == 15
    for name, weight in expected.items():
        found = restored.get_submodule(name).weight
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.detach(), weight, rtol=1e-6, atol=0)


def test_packed_weights_are_counted_as_what_they_stand_for(tiny_model: Path) -> None:
    full = count_base_weights(load(tiny_model, Unquantized()))
    for kind in (FourBit(), FourBit(quant_storage="bfloat16"), FourBit(type="fp4"), Int8()):
        report = count_base_weights(load(tiny_model, kind))
        assert report.num_weights == full.num_weights
        assert report.unquantized_linear == {}
        assert sum(report.bytes_by_dtype.values()) < sum(full.bytes_by_dtype.values()) / 1.5
    assert full.bytes_by_dtype == {"float32": 4 * full.num_weights}


def test_a_4_bit_model_that_stayed_mostly_16_bit_is_refused_by_name(tiny_model: Path) -> None:
    report = count_base_weights(load(tiny_model, Unquantized()))
    refuse_mostly_unquantized(report, Unquantized.max_unquantized)
    with pytest.raises(ModelError, match=r"100% of the linear weights .*layers\.\d\.mlp"):
        refuse_mostly_unquantized(report, FourBit.max_unquantized)


def test_trained_share_counts_packed_weights_in_full(tiny_model: Path) -> None:
    reports = [count_trained_weights(LoRA(r=4).attach(load(tiny_model, k))) for k in KINDS.values()]
    assert len({(r.trained, r.total) for r in reports}) == 1
    by_name = {row.name: row for row in reports[0].rows}
    # r x (in + out) for each of the two layers' query projections, 32 -> 32.
    assert by_name["q_proj"].num_weights == 2 * 4 * (32 + 32)
    assert by_name["q_proj"].num_modules == 2
    assert "q_proj" in reports[0].table()


@pytest.mark.parametrize(
    ("kind", "held"),
    [
        (Unquantized(dtype="bfloat16"), torch.bfloat16),
        (Unquantized(dtype="float16"), torch.float16),
        (FourBit(compute_dtype="bfloat16"), torch.bfloat16),
        (Unquantized(), torch.float32),
        (Unquantized(dtype="float32"), torch.float32),
        (Int8(), torch.float32),
    ],
    ids=str,
)
def test_weights_held_in_16_bit_are_computed_in_16_bit(kind: Any, held: torch.dtype) -> None:
    assert kind.compute_in(torch.float32) == held
    # Under autocast of another kind the weights are cast.
    assert kind.compute_in(torch.float16) == torch.float16
