"""Causal attention over documents that lie end to end, with a backward pass of its own.

Two forms of it: a document at a time, which runs anywhere, and all at once on CUDA.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from qlora_cli.kernels.elementwise import Elementwise

_cpu_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_cpu_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_BLOCK = 128
"""Queries whose scores are in memory at once: they stay in the cache of a core."""


@dataclass(frozen=True)
class Attended:
    """What attention gave, and what its backward pass needs beside its inputs."""

    output: Tensor
    """(T, H, E)"""
    normalizers: list[Tensor]
    """Of each document, where the kernel tells: (K, H / K, t). Of all at once: one of (H, T)."""


@dataclass(frozen=True)
class Documents:
    """Where each document is."""

    lengths: Sequence[int]
    """They add up to T."""
    ends: Tensor
    """(n + 1,) int32, on the device: where each begins, and where the last ends."""


class Attention(Protocol):
    """How documents are attended to."""

    def for_heads(self, size: int) -> Attention:
        """This, or what takes its place where heads have a size that it does not take."""
        ...

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, documents: Documents, scale: float
    ) -> Attended:
        """Each document attends to itself alone.

        Args:
            q: (T, H, E); k and v: (T, K, E), where H is a multiple of K.
        """
        ...

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attended: Attended,
        documents: Documents,
        scale: float,
        ops: Elementwise,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q (T, H, E), k and v (T, K, E), from that of the output (T, H, E)."""
        ...


class PerDocumentAttention:
    """Each in a call of its own: on every device, in every dtype."""

    def for_heads(self, size: int) -> Attention:
        """Of any size."""
        return self

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, documents: Documents, scale: float
    ) -> Attended:
        """As `attend`."""
        return attend(q, k, v, documents.lengths, scale)

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attended: Attended,
        documents: Documents,
        scale: float,
        ops: Elementwise,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `attend_backward`."""
        return attend_backward(grad, q, k, v, attended, documents.lengths, scale, ops)


class VarlenAttention:
    """All of them in one call of flash attention (Dao 2023, https://arxiv.org/abs/2307.08691), and
    one of its backward pass. Both know where documents end, and take fewer heads of keys than of
    queries as they are."""

    def for_heads(self, size: int) -> Attention:
        """Of multiples of 8 up to 192: above that it depends on the card."""
        return self if size % 8 == 0 and size <= 192 else PerDocumentAttention()

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, documents: Documents, scale: float
    ) -> Attended:
        """In one call."""
        # Imported late: it brings the compiler of torch with it, which takes a second.
        from torch.nn.attention.varlen import AuxRequest, varlen_attn

        ends, longest = documents.ends, max(documents.lengths)
        output, normalizer = varlen_attn(
            *(q, k, v, ends, ends, longest, longest),
            return_aux=AuxRequest(lse=True),
            scale=scale,
            window_size=_CAUSAL,
            enable_gqa=True,
        )
        return Attended(output, [normalizer])

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attended: Attended,
        documents: Documents,
        scale: float,
        ops: Elementwise,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """In one call, of the operation that torch differentiates `varlen_attn` with."""
        ends, longest = documents.ends, max(documents.lengths)
        [normalizer] = attended.normalizers
        found: tuple[Tensor, Tensor, Tensor] = torch.ops.torch_attn._varlen_attn_backward(
            *(grad, q, k, v, attended.output, normalizer, ends, ends, longest, longest),
            is_causal=True,
            rng_state=q.new_zeros(2, dtype=torch.uint64),  # of a dropout that there is none of
            scale=scale,
            window_size=list(_CAUSAL),
        )
        return found


_CAUSAL = (-1, 0)
"""Tokens that are seen to the left (all) and to the right, in `varlen_attn`'s terms."""


def choose_attention(device: torch.device, dtype: torch.dtype) -> Attention:
    """All documents at once where torch's kernel for that runs: 16 bit on cards from Ampere on."""
    if (
        device.type == "cuda"
        and torch.version.hip is None
        and dtype in (torch.float16, torch.bfloat16)
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(device) >= (8, 0)
    ):
        return VarlenAttention()
    return PerDocumentAttention()


def attend(q: Tensor, k: Tensor, v: Tensor, documents: Sequence[int], scale: float) -> Attended:
    """Each document attends to itself alone.

    Args:
        q: (T, H, E); k and v: (T, K, E), where H is a multiple of K.
        documents: lengths that add up to T.
    """
    output = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    normalizers, first = [], 0
    for length in documents:
        at = slice(first, first + length)
        parts = _by_group(q[at], k[at], v[at])
        if q.device.type == "cpu":
            part, normalizer = _cpu_forward(*parts, 0.0, True, scale=scale)
            normalizers.append(normalizer)
        else:
            part = F.scaled_dot_product_attention(*parts, is_causal=True, scale=scale)
        output[at] = part.permute(2, 0, 1, 3).flatten(1, 2)
        first += length
    return Attended(output, normalizers)


def attend_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attended: Attended,
    documents: Sequence[int],
    scale: float,
    ops: Elementwise,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q (T, H, E), k and v (T, K, E), from that of the output (T, H, E).

    On a CPU by plain products and compiled element-wise work between them, or by torch's own kernel
    where nothing is compiled. Elsewhere a document is attended to once more, by whatever kernel
    torch chooses for the device, and torch differentiates that.
    """
    grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
    groups = k.shape[1]
    first = 0
    for index, length in enumerate(documents):
        at = slice(first, first + length)
        upstream = _grouped(grad[at], groups)
        if q.device.type != "cpu":
            found = _differentiate(upstream, _by_group(q[at], k[at], v[at]), scale)
        else:
            output = _grouped(attended.output[at], groups)
            kept = upstream, output, attended.normalizers[index], scale
            if ops.is_compiled:
                found = _by_blocks(_grouped(q[at], groups), k[at], v[at], *kept, ops)
            else:
                found = _by_kernel(_by_group(q[at], k[at], v[at]), *kept)
        grads[0][at] = found[0].permute(2, 0, 1, 3).flatten(1, 2)
        for total, part in zip(grads[1:], found[1:], strict=True):
            total[at] = part.sum(1).transpose(0, 1)  # a head of keys served several of queries
        first += length
    return grads[0], grads[1], grads[2]


def _by_kernel(
    parts: tuple[Tensor, Tensor, Tensor],
    upstream: Tensor,
    output: Tensor,
    normalizer: Tensor,
    scale: float,
) -> tuple[Tensor, ...]:
    found: tuple[Tensor, ...] = _cpu_backward(
        upstream, *parts, output, normalizer, 0.0, True, scale=scale
    )
    return found


def _by_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    upstream: Tensor,
    output: Tensor,
    normalizer: Tensor,
    scale: float,
    ops: Elementwise,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same for queries in blocks, each with the keys it sees and no others (Dao et al. 2022,
    algorithm 4, without its inner loop): (K, G, t, E), and (K, 1, t, E) for keys and values.

    Scores are computed in float32, as in torch's kernel: rounded, they would shift every weight.
    """
    groups, shared_by, length, size = q.shape
    k, v = k.transpose(0, 1), v.transpose(0, 1)  # (K, t, E)
    k_float = k.float()
    shared = ops.dot(upstream, output)
    grad_q = torch.empty_like(q)
    grad_k, grad_v = k.new_zeros(2, *k.shape, dtype=torch.float32)  # for the sum over blocks
    # Whole blocks from the start: products of a new shape cost memory (`_compat.py`), and so all
    # documents share theirs but for the last block.
    for first in range(0, length, _BLOCK):
        last = min(first + _BLOCK, length)
        queries = q[:, :, first:last].reshape(groups, -1, size)
        above = upstream[:, :, first:last].reshape(groups, -1, size)
        # Compiled functions are compiled again for each way that an argument is a view: copies.
        normal, common = (x[..., first:last].flatten(1).clone() for x in (normalizer, shared))
        weights, of_scores = ops.scores_backward(
            queries.float() @ k_float[:, :last].mT,
            above @ v[:, :last].mT,
            *(normal, common),
            torch.arange(first, last).repeat(shared_by),
            scale,
        )
        grad_q[:, :, first:last] = (of_scores @ k[:, :last]).view(groups, shared_by, -1, size)
        grad_k[:, :last] += of_scores.mT @ queries
        grad_v[:, :last] += weights.mT @ above
    return grad_q, grad_k[:, None], grad_v[:, None]


def _grouped(x: Tensor, groups: int) -> Tensor:
    """(t, H, E) -> (K, H / K, t, E): the heads of queries that share one of keys, together."""
    heads: Tensor = x.unflatten(1, (groups, -1))
    return heads.permute(1, 2, 0, 3)


def _by_group(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(K, H / K, t, E) of each; keys and values are repeated without a copy."""
    groups = k.shape[1]
    q = _grouped(q, groups)
    k, v = (x.transpose(0, 1)[:, None].expand_as(q) for x in (k, v))
    return q, k, v


def _differentiate(
    upstream: Tensor, parts: tuple[Tensor, Tensor, Tensor], scale: float
) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        q, k, v = (part.detach().requires_grad_() for part in parts)
        output = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        return torch.autograd.grad(output, (q, k, v), upstream)
