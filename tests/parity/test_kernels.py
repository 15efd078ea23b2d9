"""Compare each kernel with its plain twin: the loss, and the gradient of every trained weight."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qlora_cli.kernels.attention import PerDocumentAttention, attend, attend_backward
from qlora_cli.kernels.cross_entropy import cross_entropy
from qlora_cli.kernels.decoder_layer import Recompute, fuse_layers
from qlora_cli.kernels.elementwise import Elementwise
from qlora_cli.loop.fast_path import Checkpointing, ComputeOptions, loss_kernel, prepare_layers
from tests.parity.tiny_layers import adapted, base, batch, distance, fused, loss_and_gradients


@pytest.mark.quick_every(7)
@pytest.mark.parametrize("recompute", ["none", "mlp", "all"])
@pytest.mark.parametrize("quantization", ["none", "nf4", "fp4"])
@pytest.mark.parametrize(
    "kind",
    [
        "llama",
        "llama-bias-tied",
        "llama-merged",
        "llama-every-head",
        "mistral",
        "mistral-window",
        "qwen2",
        "qwen3",
        "qwen3-bias-window",
    ],
)
def test_fused_layer_equals_the_plain_layer(
    tmp_path: Path, kind: str, quantization: str, recompute: Recompute
) -> None:
    def model(*, ours: bool) -> Any:
        return adapted(base(kind, tmp_path / "base", torch.float32, quantization), ours=ours)

    expected, gradients = loss_and_gradients(model(ours=False), torch.float32)
    found, ours = loss_and_gradients(fused(model(ours=True), recompute), torch.float32)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    assert distance(ours, gradients) < 1e-5


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["down_proj"]},
        {"rank_pattern": {"k_proj": 2, "up_proj": 7}, "alpha_pattern": {"up_proj": 3}},
        {"use_rslora": True},
        {"layers_to_transform": [1], "target_modules": ["q_proj", "up_proj"]},
    ],
    ids=["attention", "down", "patterns", "rslora", "one-layer"],
)
def test_layers_are_fused_with_any_target_modules(tmp_path: Path, changes: dict[str, Any]) -> None:
    def model(*, ours: bool) -> Any:
        return adapted(base("llama", tmp_path / "base", torch.float32, "nf4"), ours=ours, **changes)

    expected, gradients = loss_and_gradients(model(ours=False), torch.float32)
    found, ours = loss_and_gradients(fused(model(ours=True), "mlp"), torch.float32)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    assert distance(ours, gradients) < 1e-5


@pytest.mark.parametrize(
    "changes",
    [{"use_dora": True}, {"modules_to_save": ["input_layernorm"]}],
    ids=["dora", "norms"],
)
def test_unsupported_layers_are_not_fused(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = adapted(base("llama", tmp_path / "base", torch.float32, "none"), ours=True, **changes)
    assert fuse_layers(model, "none", Elementwise(), PerDocumentAttention()) == 0


def test_fused_model_evaluates_generates_and_disables_its_adapter(tmp_path: Path) -> None:
    plain = adapted(base("llama", tmp_path / "base", torch.float32, "none"), ours=True).eval()
    ours = fused(adapted(base("llama", tmp_path / "base", torch.float32, "none"), ours=True)).eval()
    ids = torch.randint(0, 90, (2, 9))
    assert torch.equal(plain(ids).logits, ours(ids).logits)
    options = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(
        plain.generate(input_ids=ids, **options), ours.generate(input_ids=ids, **options)
    )
    assert plain.state_dict().keys() == ours.state_dict().keys()
    ours.train()
    inputs = batch().inputs()
    with_update = ours(**inputs).logits.detach()
    with ours.disable_adapter():
        without = ours(**inputs).logits.detach()
    assert not torch.allclose(with_update, without)
    expected = base("llama", tmp_path / "base", torch.float32, "none")(**inputs).logits
    torch.testing.assert_close(without, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("values", [1, 100, 16 * 37, 10_000])
def test_blocks_of_rows_change_no_bit(dtype: torch.dtype, values: int) -> None:
    whole, blocks = Elementwise(), Elementwise.in_blocks(values)
    gate_up, grad = torch.randn(37, 32).to(dtype), torch.randn(37, 16).to(dtype)
    assert torch.equal(blocks.swiglu(gate_up), whole.swiglu(gate_up))
    expected = whole.swiglu_backward(grad, gate_up)
    found = blocks.swiglu_backward(grad, gate_up)
    assert [torch.equal(*pair) for pair in zip(found, expected, strict=True)] == [True, True]
    assert (found[0] is gate_up, found[1] is grad) == (True, True)  # no memory for the results


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_update_first_equals_peft(tmp_path: Path, quantization: str, dropout: float) -> None:
    def model(*, ours: bool) -> Any:
        held = base("llama-bias-tied", tmp_path / "base", torch.float32, quantization)
        return adapted(held, ours=ours, lora_dropout=dropout)

    torch.manual_seed(3)
    expected, gradients = loss_and_gradients(model(ours=False), torch.float32)
    torch.manual_seed(3)
    found, ours = loss_and_gradients(model(ours=True), torch.float32)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    assert distance(ours, gradients) < 1e-5


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_small_update_survives_bfloat16_where_pefts_order_loses_it(
    tmp_path: Path, quantization: str
) -> None:
    """Use an update of a thousandth of the output: mostly below half a unit in the last place."""

    def change(dtype: torch.dtype, *, ours: bool) -> Tensor:
        """Return the change of the output by the update."""
        model = adapted(base("llama", tmp_path / "base", dtype, quantization), ours=ours)
        layer = model.base_model.model.model.layers[0].mlp.up_proj
        torch.manual_seed(4)
        x = torch.randn(500, 32).to(torch.bfloat16).to(dtype)
        weight = layer.lora_B["default"].weight
        outputs = []
        with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            for scale in (1e-3, 0.0):
                weight.mul_(scale)
                outputs.append(layer(x).float())
        return outputs[0] - outputs[1]

    exact = change(torch.float32, ours=True)

    def kept(found: Tensor) -> float:
        """Project a change on the exact one, and return its share."""
        return float((found * exact).sum() / exact.square().sum())

    assert kept(change(torch.bfloat16, ours=True)) == pytest.approx(1, abs=0.1)
    assert kept(change(torch.bfloat16, ours=False)) < 0.5


# torch.compile imports parts of torch that warn of their own age.
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "checkpointing", "recompute"),
    [
        ("llama", "mlp", "mlp"),
        ("qwen3", False, "none"),
        ("qwen3", "mlp", "mlp"),
        ("qwen3", True, "all"),
    ],
)
def test_compiled_elementwise_work_equals_the_plain_one(
    tmp_path: Path,
    kind: str,
    checkpointing: Checkpointing,
    recompute: Recompute,
    dtype: torch.dtype,
) -> None:
    plain = adapted(base(kind, tmp_path / "base", dtype, "nf4"), ours=True)
    expected, gradients = loss_and_gradients(fused(plain, recompute), dtype)
    inner = base(kind, tmp_path / "base", dtype, "nf4")
    model, options = adapted(inner, ours=True), ComputeOptions(dtype, "compiled")
    kernels = prepare_layers(model, inner, checkpointing, options)
    assert kernels == "compiled"
    compiled = loss_kernel(kernels, torch.device("cpu"), options, 90)
    found, ours = loss_and_gradients(model, dtype, compiled)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]  # rounding between operations
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=0)
    assert distance(ours, gradients) < 5 * tolerance


@pytest.mark.parametrize("recompute", ["none", "mlp", "all"])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_fused_layer_in_bfloat16_equals_the_plain_layer_up_to_rounding(
    tmp_path: Path, kind: str, recompute: Recompute
) -> None:
    def model() -> Any:
        return adapted(base(kind, tmp_path / "base", torch.bfloat16, "nf4"), ours=True)

    expected, gradients = loss_and_gradients(model(), torch.bfloat16)
    found, ours = loss_and_gradients(fused(model(), recompute), torch.bfloat16)
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=0)
    assert distance(ours, gradients) < 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_rotate_equals_autograd(dtype: torch.dtype) -> None:
    torch.manual_seed(7)
    states, grad = torch.randn(2, 11, 6, 8).to(dtype)
    weight = (1 + 0.3 * torch.randn(6, 8)).to(dtype)
    angles = torch.rand(11, 4).repeat(1, 2)
    place = angles.cos().to(dtype), angles.sin().to(dtype)
    ops = Elementwise()
    found = ops.norm_rotate_backward(grad, states, weight, 1e-6, *place)

    exact = states.double().requires_grad_()
    normed = exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + 1e-6) * weight.double()
    cos, sin = (part.double()[:, None] for part in place)
    x, y = normed.chunk(2, -1)
    expected = normed * cos + torch.cat([-y, x], -1) * sin
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    turned = ops.norm_rotate(states, weight, 1e-6, *place)
    assert (turned.double() - expected).norm() / expected.norm() < tolerance
    (reference,) = torch.autograd.grad(expected, exact, grad.double())
    assert (found.double() - reference).norm() / reference.norm() < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_entropy_and_gradient_equal_torch(dtype: torch.dtype) -> None:
    torch.manual_seed(5)
    logits = (8 * torch.randn(40, 300)).to(dtype).requires_grad_()
    targets = torch.randint(0, 300, (40,))
    expected = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum")
    (gradient,) = torch.autograd.grad(expected, logits)
    before = logits.detach().clone()
    found, ours = cross_entropy(logits.detach(), targets)
    torch.testing.assert_close(found.sum(), expected.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(
        ours, gradient, rtol=1e-5 if dtype == torch.float32 else 8e-3, atol=1e-7
    )
    assert torch.equal(logits.detach(), before)


@pytest.mark.parametrize("is_compiled", [False, True])  # False: by torch's own kernel
def test_attention_backward_equals_single_documents(is_compiled: bool) -> None:
    torch.manual_seed(6)
    documents, heads, groups, size, scale = [1, 300, 128, 129], 6, 2, 16, 0.25
    tokens = sum(documents)
    q, grad = torch.randn(2, tokens, heads, size)
    k, v = torch.randn(2, tokens, groups, size)
    # The same products by blocks, with nothing compiled between them.
    ops = replace(Elementwise(), is_compiled=is_compiled)
    attended = attend(q, k, v, documents, scale)
    found = attend_backward(grad, (q, k, v), attended, documents, scale, ops)

    parts = [x.double().requires_grad_() for x in (q, k, v)]
    outputs = [
        torch.nn.functional.scaled_dot_product_attention(
            *(x.transpose(0, 1) for x in of_one), is_causal=True, scale=scale, enable_gqa=True
        ).transpose(0, 1)
        for of_one in zip(*(x.split(documents) for x in parts), strict=True)
    ]
    expected = torch.autograd.grad(torch.cat(outputs), parts, grad.double())
    torch.testing.assert_close(attended.output.double(), torch.cat(outputs), rtol=0, atol=1e-5)
    for ours, reference in zip(found, expected, strict=True):
        assert (ours - reference).norm() / reference.norm() < 1e-5
