"""Attention over documents whose common prefix is in the row once (the prompt of a pair).

All other work of a layer is done once for the tokens of the prefix. Attention repeats them, because
what follows sees them in each document; it is a small part of the work.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from qlora_cli.kernels.attention import QKV, Attention, AttentionOutput, DocumentBoundaries
from qlora_cli.kernels.elementwise import Elementwise


def attend_shared(
    attention: Attention, qkv: QKV, documents: DocumentBoundaries, scale: float
) -> AttentionOutput:
    """Let each document attend to its prefix and to itself.

    Args:
        qkv: of the T tokens in the row, as `Attention.forward` takes them.
    """
    shared = documents.shared
    if shared is None:
        return attention.forward(*qkv, documents, scale)
    q, k, v = (states.index_select(0, shared.gather) for states in qkv)
    found = attention.forward(q, k, v, documents, scale)
    return replace(found, output=found.output.index_select(0, shared.own))


def attend_shared_backward(
    attention: Attention,
    grad: Tensor,
    qkv: QKV,
    attended: AttentionOutput,
    documents: DocumentBoundaries,
    scale: float,
    ops: Elementwise,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of `qkv` from the output's, both of the T tokens in the row."""
    shared = documents.shared
    if shared is None:
        return attention.backward(grad, qkv, attended, documents, scale, ops)
    q, k, v = (states.index_select(0, shared.gather) for states in qkv)
    # The outputs of repeated tokens are not used, so their gradients are zero.
    whole_grad = grad.new_zeros(len(shared.gather), *grad.shape[1:])
    whole_grad[shared.own] = grad
    whole = replace(attended, output=attended.output.index_select(0, shared.gather))
    found = attention.backward(whole_grad, (q, k, v), whole, documents, scale, ops)
    sources = shared.gather[shared.repeats]
    summed = []
    for one in found:
        own = one.index_select(0, shared.own)
        # A pair repeats each token once, so that the sum has one order on any device.
        own.index_add_(0, sources, one.index_select(0, shared.repeats))
        summed.append(own)
    return summed[0], summed[1], summed[2]
