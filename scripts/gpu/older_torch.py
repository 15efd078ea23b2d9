"""Let varlen attention run on a torch that is older than the pin, so that checks still run there.

torch 2.11 takes fewer key-value heads than query heads without being told (`enable_gqa`).
Goes when no machine for checks has a torch older than 2.13.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

from torch import Tensor

from qlora_cli.kernels import attention

_NEEDED = ("return_aux", "scale", "window_size", "enable_gqa")
"""Arguments that `VarlenAttention` gives to torch."""


@cache
def missing_arguments() -> tuple[str, ...]:
    """Return the arguments of `VarlenAttention` that torch's function does not take here."""
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    return tuple(name for name in _NEEDED if name not in known)


def support_older_torch() -> str | None:
    """Adapt `VarlenAttention` to this torch, and say how; None if that is not needed."""
    missing = missing_arguments()
    if not missing:
        return None
    if missing == ("enable_gqa",):
        attention.VarlenAttention.forward = _forward_without_gqa  # type: ignore[method-assign]
        return "varlen attention: without enable_gqa, which this torch does not take"
    attention.VarlenAttention.for_heads = _one_by_one  # type: ignore[method-assign]
    return f"varlen attention: not used, because this torch does not take {', '.join(missing)}"


def _forward_without_gqa(
    self: attention.VarlenAttention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: attention.DocumentBoundaries,
    scale: float,
) -> attention.AttentionOutput:
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    ends, longest = documents.ends, max(documents.lengths)
    found: Any = varlen_attn(
        *(q, k, v, ends, ends, longest, longest),
        return_aux=AuxRequest(lse=True),
        scale=scale,
        window_size=self._seen,
    )
    return attention.AttentionOutput(found[0], [found[1]])


def _one_by_one(
    self: attention.VarlenAttention, size: int, window: int | None
) -> attention.Attention:
    return attention.PerDocumentAttention(window)
