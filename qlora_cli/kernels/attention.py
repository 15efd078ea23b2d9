"""Causal attention over concatenated documents, with its own backward pass.

It has two implementations: one document at a time, on any device, and all in one call on CUDA.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from qlora_cli.kernels.elementwise import Elementwise
from qlora_cli.types import SharedTokens

_cpu_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_cpu_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
QKV = tuple[Tensor, Tensor, Tensor]
"""Queries (T, H, E), keys and values (T, K, E)."""

_BLOCK = 128
"""Queries per block: their scores fit the cache of a core."""


@dataclass(frozen=True)
class AttentionOutput:
    """Output of attention, and what its backward pass needs in addition to its inputs."""

    output: Tensor
    """(T, H, E)"""
    normalizers: list[Tensor]
    """Log-sum-exp of the scores: (K, H / K, t) per document where the kernel returns it, or one of
    (H, T) for all documents."""


@dataclass(frozen=True)
class DocumentBoundaries:
    """Boundaries of the documents in a batch."""

    lengths: Sequence[int]
    """Their sum is T."""
    ends: Tensor
    """(n + 1,) int32, on the device: the start of each document, and the end of the last."""
    shared: SharedTokens | None = None
    """The places of prefixes that the row has once; lengths and ends are with them."""


class Attention(Protocol):
    """An implementation of attention over documents."""

    def for_heads(self, size: int, window: int | None) -> Attention:
        """Return an implementation for heads of this size.

        Args:
            window: number of tokens that a token sees, itself included; None for all before it.
        """
        ...

    def covers(self, lengths: Sequence[int]) -> bool:
        """Return whether it computes documents of these lengths."""
        ...

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, documents: DocumentBoundaries, scale: float
    ) -> AttentionOutput:
        """Let each document attend only to itself.

        Args:
            q: (T, H, E); k and v: (T, K, E), where H is a multiple of K.
        """
        ...

    def backward(
        self,
        grad: Tensor,
        qkv: QKV,
        attended: AttentionOutput,
        documents: DocumentBoundaries,
        scale: float,
        ops: Elementwise,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the gradients of `qkv`, (T, H, E) and twice (T, K, E), from the output's."""
        ...


@dataclass(frozen=True)
class PerDocumentAttention:
    """One call per document, on any device and in any dtype."""

    window: int | None = None

    def for_heads(self, size: int, window: int | None) -> Attention:
        """Return this implementation: it supports any size."""
        return PerDocumentAttention(window)

    def covers(self, lengths: Sequence[int]) -> bool:
        """Return whether each document fits the window: there is no mask."""
        return self.window is None or max(lengths) <= self.window

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, documents: DocumentBoundaries, scale: float
    ) -> AttentionOutput:
        """Call `attend`."""
        return attend(q, k, v, documents.lengths, scale)

    def backward(
        self,
        grad: Tensor,
        qkv: QKV,
        attended: AttentionOutput,
        documents: DocumentBoundaries,
        scale: float,
        ops: Elementwise,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Call `attend_backward`."""
        return attend_backward(grad, qkv, attended, documents.lengths, scale, ops)


@dataclass(frozen=True)
class VarlenAttention:
    """One call of flash attention for all documents (Dao 2023, https://arxiv.org/abs/2307.08691).

    Its kernels take the boundaries of documents, a sliding window, and fewer heads of keys than of
    queries.
    """

    window: int | None = None

    def for_heads(self, size: int, window: int | None) -> Attention:
        """Return this for multiples of 8 up to 192; larger sizes depend on the card."""
        if size % 8 == 0 and size <= 192:
            return VarlenAttention(window)
        return PerDocumentAttention(window)

    def covers(self, lengths: Sequence[int]) -> bool:
        """Return that it computes all documents."""
        return True

    @property
    def _seen(self) -> tuple[int, int]:
        """Tokens visible to the left (-1: all) and to the right, in `varlen_attn`'s terms."""
        return (-1, 0) if self.window is None else (self.window - 1, 0)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, documents: DocumentBoundaries, scale: float
    ) -> AttentionOutput:
        """Attend to all documents in one call. torch can differentiate it."""
        # Imported late: it imports torch's compiler, which takes a second.
        from torch.nn.attention.varlen import AuxRequest, varlen_attn

        ends, longest = documents.ends, max(documents.lengths)
        output, normalizer = varlen_attn(
            *(q, k, v, ends, ends, longest, longest),
            return_aux=AuxRequest(lse=True),
            scale=scale,
            window_size=self._seen,
            enable_gqa=True,
        )
        return AttentionOutput(output, [normalizer])

    def backward(
        self,
        grad: Tensor,
        qkv: QKV,
        attended: AttentionOutput,
        documents: DocumentBoundaries,
        scale: float,
        ops: Elementwise,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Call the operation with which torch differentiates `varlen_attn`."""
        q, k, v = qkv
        ends, longest = documents.ends, max(documents.lengths)
        [normalizer] = attended.normalizers
        found: tuple[Tensor, Tensor, Tensor] = torch.ops.torch_attn._varlen_attn_backward(
            *(grad, q, k, v, attended.output, normalizer, ends, ends, longest, longest),
            is_causal=self.window is None,  # as `varlen_attn` calls it: a window has its own end
            rng_state=q.new_empty(2, dtype=torch.uint64),  # only used by dropout
            scale=scale,
            window_size=list(self._seen),
        )
        return found


def choose_attention(device: torch.device, dtype: torch.dtype) -> Attention:
    """Choose the varlen kernel where torch supports it: 16 bit, on CUDA cards from Ampere on."""
    if (
        device.type == "cuda"
        and torch.version.hip is None
        and dtype in (torch.float16, torch.bfloat16)
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(device) >= (8, 0)
    ):
        return VarlenAttention()
    return PerDocumentAttention()


def attend(
    q: Tensor, k: Tensor, v: Tensor, documents: Sequence[int], scale: float
) -> AttentionOutput:
    """Let each document attend only to itself.

    Args:
        q: (T, H, E); k and v: (T, K, E), where H is a multiple of K.
        documents: lengths, whose sum is T.
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
    return AttentionOutput(output, normalizers)


def attend_backward(
    grad: Tensor,
    qkv: QKV,
    attended: AttentionOutput,
    documents: Sequence[int],
    scale: float,
    ops: Elementwise,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of `qkv`, (T, H, E) and twice (T, K, E), from the output's (T, H, E).

    On a CPU this takes matmuls with compiled element-wise work between them, or torch's own kernel
    where nothing is compiled. On other devices the forward pass of a document is repeated with the
    kernel that torch chooses, and torch differentiates that.
    """
    q, k, v = qkv
    grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in qkv]
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
                found = _backward_by_blocks((_grouped(q[at], groups), k[at], v[at]), *kept, ops)
            else:
                found = _backward_by_kernel(_by_group(q[at], k[at], v[at]), *kept)
        grads[0][at] = found[0].permute(2, 0, 1, 3).flatten(1, 2)
        for total, part in zip(grads[1:], found[1:], strict=True):
            total[at] = part.sum(1).transpose(0, 1)  # a head of keys serves several of queries
        first += length
    return grads[0], grads[1], grads[2]


def _backward_by_kernel(
    qkv: QKV,
    grad: Tensor,
    output: Tensor,
    normalizer: Tensor,
    scale: float,
) -> tuple[Tensor, ...]:
    found: tuple[Tensor, ...] = _cpu_backward(
        grad, *qkv, output, normalizer, 0.0, True, scale=scale
    )
    return found


def _backward_by_blocks(
    qkv: QKV,
    grad: Tensor,
    output: Tensor,
    normalizer: Tensor,
    scale: float,
    ops: Elementwise,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients block by block of queries, each with only the keys that it sees.

    This is algorithm 4 of Dao et al. 2022 (https://arxiv.org/abs/2205.14135) without its inner
    loop. Scores are computed in float32, as in torch's kernel: rounded scores would shift every
    weight.

    Args:
        qkv: q (K, G, t, E), k and v (t, K, E); G query heads share a head of keys.
        grad: (K, G, t, E), like `output`.

    Returns:
        Gradients (K, G, t, E), and (K, 1, t, E) for keys and values.
    """
    q, k, v = qkv
    groups, shared_by, length, size = q.shape
    k, v = k.transpose(0, 1), v.transpose(0, 1)  # (K, t, E)
    k_float = k.float()
    shared = ops.dot(grad, output)
    grad_q = torch.empty_like(q)
    grad_k, grad_v = k.new_zeros(2, *k.shape, dtype=torch.float32)  # sums over blocks
    # All blocks but the last have one size: matmuls of a new shape cost memory (`_compat.py`).
    for first in range(0, length, _BLOCK):
        last = min(first + _BLOCK, length)
        queries = q[:, :, first:last].reshape(groups, -1, size)
        above = grad[:, :, first:last].reshape(groups, -1, size)
        # Copies, because functions are compiled again for each kind of view.
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
    """(t, H, E) -> (K, H / K, t, E): group the query heads that share a head of keys."""
    heads: Tensor = x.unflatten(1, (groups, -1))
    return heads.permute(1, 2, 0, 3)


def _by_group(q: Tensor, k: Tensor, v: Tensor) -> QKV:
    """Return q, k and v as (K, H / K, t, E), keys and values expanded without a copy."""
    groups = k.shape[1]
    q = _grouped(q, groups)
    k, v = (x.transpose(0, 1)[:, None].expand_as(q) for x in (k, v))
    return q, k, v


def _differentiate(grad: Tensor, qkv: QKV, scale: float) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        q, k, v = (part.detach().requires_grad_() for part in qkv)
        output = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        return torch.autograd.grad(output, (q, k, v), grad)
