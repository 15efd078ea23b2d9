"""Checks of attention: the back end that torch takes, and one call for all documents."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qlora_cli.kernels.attention import (
    AttentionOutput,
    DocumentBoundaries,
    PerDocumentAttention,
    VarlenAttention,
    attend_backward,
    choose_attention,
)
from qlora_cli.kernels.elementwise import Elementwise
from qlora_cli.models.loading import load_base
from qlora_cli.models.packed_attention import NAME, attend_by_document
from qlora_cli.plan.trace.memory_counter import MemoryCounter
from qlora_cli.plan.trace.traced_tensor import TracedTensor
from scripts.gpu.bench import MIB, Bench, NotHere, distance
from scripts.gpu.training import world_of

_BACK_ENDS = {-1: "none", 0: "math", 1: "flash", 2: "efficient", 3: "cuDNN", 4: "overrideable"}
"""torch.nn.attention.SDPBackend by number."""


@contextmanager
def cudnn_attention(enabled: bool) -> Iterator[None]:
    """Turn attention by cuDNN on or off, and back."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(enabled)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def states(bench: Bench, length: int) -> list[Tensor]:
    """Return random queries, keys and values (1, H, T, E) that require gradients."""
    heads, size = bench.sizes.heads, bench.sizes.head_size
    dtype = torch.bfloat16
    return [
        torch.randn(1, heads, length, size, device=bench.device, dtype=dtype, requires_grad=True)
        for _ in range(3)
    ]


def causal_mask(bench: Bench, length: int) -> Tensor:
    ones = torch.ones(length, length, dtype=torch.bool, device=bench.device)
    return ones.tril()[None, None]


def back_end(bench: Bench) -> str:
    """Expect any back end but cuDNN with and without a mask, because `World` turns it off."""
    world_of(bench)
    q, k, v = states(bench, 703 if bench.is_cuda else 23)
    mask, as_set = causal_mask(bench, q.shape[2]), torch.backends.cuda.cudnn_sdp_enabled()
    chosen = {}
    for name, is_on in (("torch's own choice", True), ("in a run", as_set)):
        with cudnn_attention(is_on):
            plain = torch._fused_sdp_choice(q, k, v, is_causal=True)
            masked = torch._fused_sdp_choice(q, k, v, attn_mask=mask)
        chosen[name] = [_BACK_ENDS[plain], _BACK_ENDS[masked]]
    bench.note("back_ends", chosen)
    figures = "; ".join(f"{name}: {a}, with a mask {b}" for name, (a, b) in chosen.items())
    bench.needs_card()
    assert not torch.backends.cuda.cudnn_sdp_enabled(), f"cuDNN attention is on; {figures}"
    assert "cuDNN" not in chosen["in a run"], figures
    return figures


def new_lengths(bench: Bench) -> str:
    """Expect calls with new lengths to take milliseconds each; cuDNN plans for each of them."""

    def seconds(first: int) -> float:
        bench.synchronize()
        started = time.perf_counter()
        for length in range(first, first + bench.sizes.new_lengths):
            q, k, v = states(bench, length)
            F.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()
        bench.synchronize()
        return time.perf_counter() - started

    number = bench.sizes.new_lengths
    with cudnn_attention(False):
        seconds(900)  # starts the libraries
        own = bench.note("milliseconds_each", 1000 * seconds(300) / number)
    with cudnn_attention(True):
        other = bench.note("milliseconds_each_with_cudnn", 1000 * seconds(300) / number)
    figures = f"{own:.1f} ms for each new length, {other:.1f} with cuDNN allowed"
    bench.needs_card()
    assert own < 20, figures
    return figures


def masked_gradients(bench: Bench) -> str:
    """Expect finite, right gradients with a mask at 704 tokens, where cuDNN returned NaN."""
    torch.manual_seed(0)
    length = 704 if bench.is_cuda else 24
    found: dict[str, list[Tensor]] = {}
    for name in ("in a run", "with cuDNN allowed", "float32"):
        torch.manual_seed(1)
        qkv = states(bench, length)
        inputs = [x.float() for x in qkv] if name == "float32" else qkv
        with cudnn_attention(name == "with cuDNN allowed"):
            output = F.scaled_dot_product_attention(*inputs, attn_mask=causal_mask(bench, length))
            found[name] = list(torch.autograd.grad(output.float().square().sum(), qkv))
    errors = {
        name: max(distance(*pair) for pair in zip(found[name], found["float32"], strict=True))
        for name in ("in a run", "with cuDNN allowed")
    }
    bench.note("relative_error_with_cudnn", errors["with cuDNN allowed"])
    with_cudnn = f"with cuDNN allowed {errors['with cuDNN allowed']:.1e}"
    return f"{bench.at_most(errors['in a run'], 5e-2, 'relative error')}; {with_cudnn}"


def reference_attention(
    qkv: list[Tensor], grad: Tensor, lengths: tuple[int, ...], window: int | None = None
) -> list[Tensor]:
    """Return the output and the gradients of q, k and v in float32, document by document."""
    leaves = [x.float().requires_grad_() for x in qkv]
    outputs, first = [], 0
    for length in lengths:
        q, k, v = (x[first : first + length].transpose(0, 1)[None] for x in leaves)
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        seen = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
        part = F.scaled_dot_product_attention(q, k, v, seen.triu(1 - (window or length)))
        outputs.append(part[0].transpose(0, 1))
        first += length
    output = torch.cat(outputs)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad.float())]


def varlen(bench: Bench, dtype: torch.dtype, size: int, window: int | None = None) -> str:
    """Compare one call for all documents with float32, and its memory with what a plan counts.

    Expect 2e-2 at most, and the memory to the tenth. Two equal calls may differ in the gradient of
    the queries: flash attention adds it up by atomic operations, in any order.
    """
    lengths, heads, groups = bench.sizes.lengths, 16, 4
    ends = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    documents = DocumentBoundaries(lengths, ends.to(bench.device))
    torch.manual_seed(0)
    options: dict[str, Any] = {"device": bench.device, "dtype": dtype}
    q, grad = torch.randn(2, sum(lengths), heads, size, **options)
    k, v = torch.randn(2, sum(lengths), groups, size, **options)
    scale, ops = size**-0.5, Elementwise()
    expected = reference_attention([q, k, v], grad, lengths, window)
    attention = choose_attention(bench.device, dtype).for_heads(size, window)
    if not attention.covers(lengths):
        raise NotHere(
            "without varlen attention, longer documents than the window are left to torch"
        )
    one = attention.forward(q, k, v, documents, scale)
    bench.start_memory()
    before = torch.cuda.memory_allocated() if bench.is_cuda else 0
    found = attention.backward(grad, (q, k, v), one, documents, scale, ops)
    taken = bench.peak_memory()[0] - before
    again = attention.backward(grad, (q, k, v), one, documents, scale, ops)
    is_same = all(bool((a == b).all()) for a, b in zip(found, again, strict=True))
    bench.note("backward_is_repeatable", is_same)
    pairs = zip((one.output, *found), expected, strict=True)
    text = bench.at_most(max(distance(*pair) for pair in pairs), 2e-2, "relative error")
    text += f"; a repeated backward pass is {'equal' if is_same else 'not bit for bit equal'}"
    if isinstance(attention, PerDocumentAttention):
        raise NotHere(f"varlen attention is not used here; document by document: {text}")
    counted = counted_backward(one, (grad, q, k, v), documents, scale, window)
    figures = f"backward takes {taken / MIB:.1f} MiB, counted {counted / MIB:.1f}"
    bench.note("backward_bytes", taken)
    bench.note("counted_bytes", counted)
    assert abs(taken - counted) <= 0.1 * taken, f"{figures}; {text}"
    return f"{text}; {figures}"


def counted_backward(
    one: AttentionOutput,
    tensors: tuple[Tensor, ...],
    documents: DocumentBoundaries,
    scale: float,
    window: int | None,
) -> int:
    """Return the bytes that a plan counts for the backward pass."""
    seen = [-1, 0] if window is None else [window - 1, 0]
    ends, longest = documents.ends.cpu(), max(documents.lengths)
    traced = [TracedTensor(x.to("meta")) for x in (*tensors, one.output, one.normalizers[0])]
    with torch.no_grad(), MemoryCounter("cuda", granularity=512) as count:
        torch.ops.torch_attn._varlen_attn_backward(
            *traced, ends, ends, longest, longest, window is None, traced[0], scale, seen
        )
    return max(peak.total for peak in count.peaks.values())


def document_by_document(bench: Bench, dtype: torch.dtype) -> str:
    """Compare `PerDocumentAttention`, which cards before Ampere use, with float32."""
    lengths, heads, groups, size = bench.sizes.lengths, 16, 4, 64
    torch.manual_seed(0)
    options: dict[str, Any] = {"device": bench.device, "dtype": dtype}
    q, grad = torch.randn(2, sum(lengths), heads, size, **options)
    k, v = torch.randn(2, sum(lengths), groups, size, **options)
    expected = reference_attention([q, k, v], grad, lengths)
    ends = torch.tensor([0, *lengths], device=bench.device).cumsum(0, dtype=torch.int32)
    documents, attention = DocumentBoundaries(lengths, ends), PerDocumentAttention()
    one = attention.forward(q, k, v, documents, size**-0.5)
    found = attend_backward(grad, (q, k, v), one, lengths, size**-0.5, Elementwise())
    pairs = zip((one.output, *found), expected, strict=True)
    return bench.at_most(max(distance(*pair) for pair in pairs), 2e-2, "relative error")


def no_flash_attention_package(bench: Bench) -> str:
    """Expect packed documents without the package flash-attn: torch has the kernels."""
    recipe = bench.recipe("package")
    base = load_base(recipe.model, recipe.quantization, torch.bfloat16, bench.device)
    assert attend_by_document(base), base.config._attn_implementation
    assert base.config._attn_implementation == NAME
    attention = type(choose_attention(bench.device, torch.bfloat16)).__name__
    is_installed = importlib.util.find_spec("flash_attn") is not None
    bench.note("attention", attention)
    bench.note("has_flash_attn", is_installed)
    bench.needs_card()
    capability = torch.cuda.get_device_capability(bench.device)
    expected = VarlenAttention if capability >= (8, 0) else PerDocumentAttention
    assert attention == expected.__name__, f"{attention} on sm_{capability[0]}{capability[1]}"
    return f"{attention}; the package flash-attn is {'' if is_installed else 'not '}installed"
