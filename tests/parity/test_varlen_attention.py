"""Test varlen attention with a plain kernel in place of CUDA's, below torch's own operations.

This verifies the arguments of these operations and the use of their results.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qlora_cli.kernels.attention import (
    DocumentBoundaries,
    PerDocumentAttention,
    VarlenAttention,
    attend,
    attend_backward,
    choose_attention,
)
from qlora_cli.kernels.decoder_layer import FusedLayer, Recompute
from qlora_cli.kernels.elementwise import Elementwise
from qlora_cli.models.packed_attention import _attend
from qlora_cli.plan.trace.memory_counter import MemoryCounter
from qlora_cli.plan.trace.traced_tensor import TracedTensor
from tests.parity.tiny_layers import DOCUMENTS, adapted, base, distance, fused, loss_and_gradients

# torch.nn.attention.varlen imports parts of torch that warn of their own age.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

LENGTHS = (1, 30, 8, 129)


def documents(lengths: tuple[int, ...] = LENGTHS) -> DocumentBoundaries:
    return DocumentBoundaries(lengths, torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32))


def states(heads: int = 6, groups: int = 2, size: int = 16) -> tuple[Tensor, ...]:
    """Make the gradient of the output, and queries, keys and values as views of one tensor."""
    torch.manual_seed(0)
    tokens = sum(LENGTHS)
    product = torch.randn(tokens, heads + 2 * groups, size)
    q, k, v = product.split([heads, groups, groups], 1)
    return torch.randn(tokens, heads, size), q, k, v


def hidden(length: int, left: int) -> Tensor:
    """Return which keys (t, t) a query does not see: later ones, and those before its window."""
    ones = torch.ones(length, length, dtype=torch.bool)
    later = ones.triu(1)
    return later if left == -1 else later | ones.tril(-left - 1)


def plain(
    q: Tensor, k: Tensor, v: Tensor, ends: Tensor, left: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Compute the output of flash attention (T, H, E), and its log-sum-exp (H, T)."""
    outputs, sums = [], []
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    for first, last in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        at = slice(first, last)
        scores = torch.einsum("qhe,khe->hqk", q[at], k[at]) * scale
        scores = scores.masked_fill(hidden(last - first, left), -torch.inf)
        outputs.append(torch.einsum("hqk,khe->qhe", scores.softmax(-1), v[at]))
        sums.append(scores.logsumexp(-1))
    return torch.cat(outputs), torch.cat(sums, 1)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ends_q: Tensor,
    ends_k: Tensor,
    longest_q: int,
    longest_k: int,
    dropout: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float,
    window_size_left: int,
    window_size_right: int,
    **options: Any,
) -> tuple[Tensor, ...]:
    assert ends_q.dtype == ends_k.dtype == torch.int32
    assert longest_q == longest_k == int(ends_q.diff().max())
    assert (dropout, window_size_right) == (0.0, 0)
    assert is_causal == (window_size_left == -1)
    assert not any(options.values())
    output, sums = plain(q, k, v, ends_q, window_size_left, scale)
    unused = torch.zeros(2, dtype=torch.uint64)
    return output, sums, unused, unused.clone(), q.new_empty(0)


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    output: Tensor,
    sums: Tensor,
    ends_q: Tensor,
    ends_k: Tensor,
    longest_q: int,
    longest_k: int,
    dropout: float,
    is_causal: bool,
    state: Tensor,
    unused: Tensor,
    *,
    scale: float,
    window_size_left: int,
    window_size_right: int,
) -> tuple[Tensor, ...]:
    """Compute gradients from the output and the log-sum-exp (Dao et al. 2022, appendix B.4)."""
    again, sums_again = plain(q, k, v, ends_q, window_size_left, scale)
    torch.testing.assert_close(output, again)
    torch.testing.assert_close(sums, sums_again)
    assert (dropout, window_size_right) == (0.0, 0)
    assert is_causal == (window_size_left == -1)
    groups, repeats = k.shape[1], q.shape[1] // k.shape[1]
    every_k, every_v = (x.repeat_interleave(repeats, 1) for x in (k, v))
    grads = [torch.empty_like(grad) for _ in range(3)]
    for first, last in zip(ends_q[:-1].tolist(), ends_q[1:].tolist(), strict=True):
        at = slice(first, last)
        scores = torch.einsum("qhe,khe->hqk", q[at], every_k[at]) * scale
        weights = torch.exp(scores - sums[:, at, None])
        weights = weights.masked_fill(hidden(last - first, window_size_left), 0.0)
        of_weights = torch.einsum("qhe,khe->hqk", grad[at], every_v[at])
        shared = (grad[at] * output[at]).sum(-1).T[..., None]
        of_scores = weights * (of_weights - shared) * scale
        grads[0][at] = torch.einsum("hqk,khe->qhe", of_scores, every_k[at])
        grads[1][at] = torch.einsum("hqk,qhe->khe", of_scores, q[at])
        grads[2][at] = torch.einsum("hqk,qhe->khe", weights, grad[at])
    of_groups = (x.unflatten(1, (groups, repeats)).sum(2) for x in grads[1:])
    return grads[0], *of_groups


@pytest.fixture
def kernel() -> Iterator[None]:
    """Register a CPU kernel, which torch does not have."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", forward, "CPU")
    library.impl("_flash_attention_backward", backward, "CPU")
    yield
    library._destroy()


@pytest.mark.parametrize(("heads", "groups"), [(6, 2), (4, 4), (4, 1)])
def test_varlen_attention_equals_single_documents(kernel: None, heads: int, groups: int) -> None:
    grad, q, k, v = states(heads, groups)
    scale, ops = 0.3, Elementwise()
    one = VarlenAttention().forward(q, k, v, documents(), scale)
    each = attend(q, k, v, LENGTHS, scale)
    torch.testing.assert_close(one.output, each.output, rtol=1e-5, atol=1e-5)
    found = VarlenAttention().backward(grad, (q, k, v), one, documents(), scale, ops)
    expected = attend_backward(grad, (q, k, v), each, LENGTHS, scale, ops)
    for ours, reference in zip(found, expected, strict=True):
        assert ours.shape == reference.shape
        assert (ours - reference).norm() / reference.norm() < 1e-5


@pytest.mark.parametrize("kind", ["mistral-window", "qwen3-bias-window"])
def test_documents_beyond_a_window_are_computed_in_one_call(
    kernel: None, tmp_path: Path, kind: str
) -> None:
    """Documents of 40 and 13 tokens, a window of 9: as transformers' layers with a mask."""

    def model() -> Any:
        return adapted(base(kind, tmp_path / "base", torch.float32, "none"), ours=True)

    expected, gradients = loss_and_gradients(model(), torch.float32)
    varlen = fused(model(), "all", attention=VarlenAttention())
    layers = [module for module in varlen.modules() if isinstance(module, FusedLayer)]
    assert all(layer._parts.can_compute(DOCUMENTS) for layer in layers)
    found, ours = loss_and_gradients(varlen, torch.float32)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    assert distance(ours, gradients) < 1e-5


@pytest.mark.parametrize("kind", ["llama", "mistral-window", "qwen3-bias-window"])
def test_layers_that_are_not_fused_attend_in_one_call(
    kernel: None, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attend as on a card: `choose_attention` returns varlen attention there in 16 bit."""

    def model() -> Any:
        return adapted(base(kind, tmp_path / "base", torch.float32, "none"), ours=True)

    expected, gradients = loss_and_gradients(model(), torch.float32)
    calls = []
    monkeypatch.setattr(
        "qlora_cli.kernels.attention.choose_attention",
        lambda device, dtype: calls.append(dtype) or VarlenAttention(),
    )
    found, ours = loss_and_gradients(model(), torch.float32)
    assert calls
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    assert distance(ours, gradients) < 1e-5


@pytest.mark.parametrize(("value_size", "key_dtype"), [(8, torch.float32), (16, torch.bfloat16)])
def test_states_that_the_kernel_does_not_take_are_computed_by_document(
    value_size: int, key_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSeek's values are narrower than its keys. On a card the kernel refuses both cases."""
    q, k, v = (x.transpose(0, 1)[None] for x in states(4, 4)[1:])
    v = v[..., :value_size]

    def attend_with(k: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            lengths = {"documents": LENGTHS, "cu_seq_lens_q": documents().ends}
            return _attend(torch.nn.Module(), q, k, v, None, sliding_window=None, **lengths)[0]

    expected = attend_with(k)
    # This test has no kernel, so that a call of it fails.
    monkeypatch.setattr(
        "qlora_cli.kernels.attention.choose_attention", lambda device, dtype: VarlenAttention()
    )
    found = attend_with(k.to(key_dtype))
    assert found.shape == (1, sum(LENGTHS), 4, value_size)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("recompute", ["none", "mlp", "all"])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_fused_layer_is_the_same_with_varlen_attention(
    kernel: None, tmp_path: Path, kind: str, recompute: Recompute
) -> None:
    def model() -> Any:
        return adapted(base(kind, tmp_path / "base", torch.float32, "none"), ours=True)

    expected, gradients = loss_and_gradients(fused(model(), recompute), torch.float32)
    found, ours = loss_and_gradients(
        fused(model(), recompute, attention=VarlenAttention()), torch.float32
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    assert distance(ours, gradients) < 1e-5


def test_private_operations_of_torch_keep_their_arguments() -> None:
    """They are private, so a new version of torch may change their arguments."""
    import torch.nn.attention.varlen  # registers them

    schema = torch.ops.torch_attn._varlen_attn_backward.default._schema
    assert str(schema) == (
        "torch_attn::_varlen_attn_backward(Tensor grad_out, Tensor query, Tensor key, "
        "Tensor value, Tensor out, Tensor lse, Tensor cu_seq_q, Tensor cu_seq_k, SymInt max_q, "
        "SymInt max_k, bool is_causal, Tensor rng_state, float? scale=None, "
        "SymInt[]? window_size=None) -> (Tensor, Tensor, Tensor)"
    )
    sizes = [str(one.type) for one in torch.ops.torch_attn._varlen_attn.default._schema.returns]
    assert sizes == ["Tensor", "Tensor", "Tensor"]


def test_gradients_have_the_shapes_of_their_tensors() -> None:
    grad, q, k, v = (x.to("meta", torch.bfloat16) for x in states())
    places = DocumentBoundaries(LENGTHS, documents().ends.to("meta"))
    attended = VarlenAttention().forward(q, k, v, places, 0.25)
    assert attended.output.shape == q.shape
    assert attended.output.dtype == torch.bfloat16
    assert [n.shape for n in attended.normalizers] == [(q.shape[1], q.shape[0])]
    found = VarlenAttention().backward(grad, (q, k, v), attended, places, 0.25, Elementwise())
    assert [x.shape for x in found] == [q.shape, k.shape, v.shape]


@pytest.mark.parametrize("groups", [2, 6])
def test_allocations_of_the_cuda_kernel_are_counted(groups: int) -> None:
    tokens, heads, size = sum(LENGTHS), 6, 40
    grad, q, k, v = (
        TracedTensor(x.to("meta", torch.bfloat16)) for x in states(heads, groups, size)
    )
    places, attention = documents(), VarlenAttention()
    with torch.no_grad(), MemoryCounter("cuda") as count:
        with count.stage("forward"):
            attended = attention.forward(q, k, v, places, 0.25)
            assert count.total == 2 * tokens * heads * size + 4 * heads * tokens
        with count.stage("backward"):
            made = attention.backward(grad, (q, k, v), attended, places, 0.25, Elementwise())
    held = 2 * tokens * heads * size + 4 * heads * tokens
    grads = 2 * tokens * (heads + 2 * groups) * size
    rows = tokens + 128 * len(LENGTHS)
    inside = 4 * rows * heads * 64 + 4 * rows * heads  # the width rounded up to 64
    inside += 2 * (2 * tokens * heads * size) * (groups < heads)
    peaks = {segment.stage: peak.total for segment, peak in count.peaks.items()}
    state = 16
    assert peaks["backward"] == held + grads + inside + state
    assert count.total == held + grads
    assert [x.shape for x in made] == [q.shape, k.shape, v.shape]
    pairs = sum(n * n for n in LENGTHS)
    assert count.flops["forward"] == 4 * heads * size * pairs
    assert count.flops["backward"] == 10 * heads * size * pairs


def test_cpu_attends_to_documents_one_by_one() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert isinstance(choose_attention(torch.device("cpu"), dtype), PerDocumentAttention)


@pytest.mark.parametrize(
    ("size", "kind"),
    [
        (64, VarlenAttention),
        (80, VarlenAttention),
        (192, VarlenAttention),
        (100, PerDocumentAttention),
        (256, PerDocumentAttention),
    ],
)
def test_unsupported_head_sizes_fall_back(size: int, kind: type) -> None:
    assert type(VarlenAttention().for_heads(size, None)) is kind
    assert type(PerDocumentAttention().for_heads(size, 9)) is PerDocumentAttention
