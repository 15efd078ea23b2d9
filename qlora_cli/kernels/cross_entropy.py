"""Cross-entropies of a chunk of logits, and their gradient, in one visit to the widest tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_cli.kernels.compiling import CompiledFunction

CrossEntropy = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Maps logits (N, V) and targets (N,) to losses (N,) in float32, and the gradient of their sum."""


@dataclass(frozen=True)
class LossChunks:
    """How many rows of logits are computed at a time.

    A larger chunk saves no time once a matmul uses the whole machine.
    """

    num_bytes: int = 24 * 2**20
    """Bytes of the logits of a chunk in float32. On a CPU, a chunk should fit the caches, and
    malloc reuses its memory instead of returning it."""
    tile: int = 1
    """Rows of a tile of a matmul: with a part of one, some units of a GPU would wait."""

    @classmethod
    def on(cls, device_type: str) -> LossChunks:
        """Return the chunks for a type of device."""
        return cls() if device_type == "cpu" else cls(128 * 2**20, 128)

    def split(self, num_rows: int, vocabulary_size: int) -> Iterator[slice]:
        """Split rows into chunks; whole tiles if they fit."""
        step = max(1, self.num_bytes // (4 * vocabulary_size))
        if step > self.tile:
            step -= step % self.tile
        return (slice(start, start + step) for start in range(0, num_rows, step))


def cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the cross-entropy of each target, and the gradient of their sum.

    Args:
        logits: (N, V), in any float dtype; computed in float32.
        targets: (N,)

    Returns:
        Losses (N,) in float32, and softmax(logits) - onehot(targets), (N, V) in the dtype of the
        logits. Row n of it is the gradient of loss n.
    """
    work = logits.float() if logits.dtype != torch.float32 else logits.clone()
    at = targets[:, None]
    wanted = work.gather(1, at)
    largest = work.amax(1, keepdim=True)
    # One buffer for everything: allocating one costs as much as the operation.
    total = work.sub_(largest).exp_().sum(1, keepdim=True)
    losses = (total.log() - (wanted - largest)).squeeze(1)
    work.div_(total).scatter_add_(1, at, work.new_full(at.shape, -1.0))
    return losses, work.to(logits.dtype)


def _to_be_compiled(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the same without in-place writes, so that a compiler can fuse it."""
    work = logits.float()
    largest = work.amax(1, keepdim=True)
    exponentials = (work - largest).exp()
    total = exponentials.sum(1, keepdim=True)
    losses = (total.log() - (work.gather(1, targets[:, None]) - largest)).squeeze(1)
    columns = torch.arange(logits.shape[1], device=logits.device)
    grad = exponentials / total - (columns[None] == targets[:, None]).float()
    return losses, grad.to(logits.dtype)


def compiled_cross_entropy() -> CrossEntropy:
    """Return `cross_entropy` through torch.compile, for any number of tokens."""
    return CompiledFunction(_to_be_compiled, {0: (0,), 1: (0,)})
