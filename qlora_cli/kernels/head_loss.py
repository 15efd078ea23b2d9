"""The cross-entropy of `head(hidden)`, with its gradient computed on the way, chunk by chunk."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qlora_cli.kernels.cross_entropy import CrossEntropy, LossChunks, cross_entropy


def vocabulary_size(head: nn.Module) -> int:
    """Return the number of logits of a head, with or without PEFT's wrapper around it."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    inner: Any = head
    if isinstance(head, AuxiliaryTrainingWrapper):
        inner = head.original_module
    elif isinstance(head, BaseTunerLayer):
        inner = head.get_base_layer()
    return int(inner.out_features)


def head_loss(
    hidden: Tensor,
    targets: Tensor,
    head: nn.Module,
    cross_entropy: CrossEntropy = cross_entropy,
    chunks: LossChunks | None = None,
) -> Tensor:
    """Sum the cross-entropy of `head(hidden)` against `targets`; compute its gradient on the way.

    Args:
        hidden: (N, D), the hidden states that predict the targets.
        targets: (N,)
        head: D -> V; its trainable weights get their gradients too.
        chunks: rows of logits to compute at a time; None are those of the device.
    """
    chunks = chunks or LossChunks.on(hidden.device.type)
    weights = [p for p in head.parameters() if p.requires_grad]
    loss: Tensor = _HeadLoss.apply(  # type: ignore[no-untyped-call]  # torch is not typed here
        hidden, targets, head, cross_entropy, chunks, *weights
    )
    return loss


class _HeadLoss(torch.autograd.Function):
    """Compute logits once per chunk: they are freed after their gradient, before backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        targets: Tensor,
        head: nn.Module,
        cross_entropy: CrossEntropy,
        chunks: LossChunks,
        *weights: Tensor,
    ) -> Tensor:
        wanted = any(ctx.needs_input_grad)
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        hidden_grad = torch.empty_like(hidden) if wanted else None
        weight_grads = [torch.zeros_like(weight) for weight in weights]
        for rows in chunks.split(len(targets), vocabulary_size(head)):
            with torch.set_grad_enabled(wanted):
                states = hidden[rows].detach().requires_grad_(wanted)
                logits = head(states)  # (n, V)
            chunk, grad_logits = cross_entropy(logits.detach(), targets[rows])
            loss += chunk.sum()
            if hidden_grad is not None:
                grads = torch.autograd.grad(logits, [states, *weights], grad_logits)
                hidden_grad[rows] = grads[0]
                for total, grad in zip(weight_grads, grads[1:], strict=True):
                    total += grad
        if hidden_grad is not None:
            ctx.save_for_backward(hidden_grad, *weight_grads)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad, *weight_grads = ctx.saved_tensors
        # The scale stays a tensor, because reading it would make the host wait for the device. It
        # stays float32, because a rounded one would scale the whole step wrongly.
        scaled = [
            (grad.float() * grad_loss).to(grad.dtype) for grad in (hidden_grad, *weight_grads)
        ]
        return scaled[0], None, None, None, None, *scaled[1:]


def head_losses(
    hidden: Tensor,
    targets: Tensor,
    head: nn.Module,
    cross_entropy: CrossEntropy,
    chunks: LossChunks,
) -> Tensor:
    """Compute the cross-entropy of `head(hidden)` for each target, (N,) in float32.

    Unlike in `head_loss`, the losses may be used with different factors. The gradient of a hidden
    state is that of its own loss, so it is computed on the way here too; the gradient of a head
    that is trained is not, and its logits are computed a second time in the backward pass.

    Args:
        hidden: (N, D), the hidden states that predict the targets.
        targets: (N,)
        head: D -> V.
    """
    if any(p.requires_grad for p in head.parameters()):
        return checkpointed_losses(hidden, targets, head, chunks)
    losses: Tensor = _HeadLosses.apply(  # type: ignore[no-untyped-call]  # torch is not typed here
        hidden, targets, head, cross_entropy, chunks
    )
    return losses


class _HeadLosses(torch.autograd.Function):
    """Compute logits once per chunk: they are freed after their gradient, before backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        targets: Tensor,
        head: nn.Module,
        cross_entropy: CrossEntropy,
        chunks: LossChunks,
    ) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        losses = torch.zeros(len(targets), dtype=torch.float32, device=hidden.device)
        hidden_grad = torch.empty_like(hidden) if wanted else None
        for rows in chunks.split(len(targets), vocabulary_size(head)):
            with torch.set_grad_enabled(wanted):
                states = hidden[rows].detach().requires_grad_(wanted)
                logits = head(states)  # (n, V)
            losses[rows], grad_logits = cross_entropy(logits.detach(), targets[rows])
            if hidden_grad is not None:
                [hidden_grad[rows]] = torch.autograd.grad(logits, [states], grad_logits)
        if hidden_grad is not None:
            ctx.save_for_backward(hidden_grad)
        return losses

    @staticmethod
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor | None, ...]:
        [hidden_grad] = ctx.saved_tensors
        scaled = (hidden_grad.float() * grad_losses[:, None]).to(hidden_grad.dtype)
        return scaled, None, None, None, None


def checkpointed_losses(
    hidden: Tensor, targets: Tensor, head: nn.Module, chunks: LossChunks
) -> Tensor:
    """Compute the same with torch's own functions: logits are computed again for the gradient."""

    def of_rows(rows: Tensor, row_targets: Tensor) -> Tensor:
        return F.cross_entropy(head(rows).float(), row_targets, reduction="none")

    if not len(hidden):  # a rank without rows in a step takes part in the backward pass
        nothing: Tensor = head(hidden).float().sum(1)
        return nothing
    width = hidden.shape[1] if isinstance(head, nn.Identity) else vocabulary_size(head)
    parts = [
        checkpoint(of_rows, hidden[rows], targets[rows], use_reentrant=False)
        for rows in chunks.split(len(hidden), width)
    ]
    return torch.cat(parts)


def chunked_cross_entropy(logits: Tensor, targets: Tensor, chunks: LossChunks) -> Tensor:
    """Sum the cross-entropy of logits (N, V), with one chunk of them in float32 at a time."""

    def of_rows(rows: Tensor, row_targets: Tensor) -> Tensor:
        return F.cross_entropy(rows.float(), row_targets, reduction="sum")

    if not len(logits):  # a rank without rows in a step takes part in the backward pass
        return logits.float().sum()
    loss = torch.zeros((), dtype=torch.float32, device=logits.device)
    for rows in chunks.split(logits.shape[0], logits.shape[1]):
        chunk: Tensor = checkpoint(of_rows, logits[rows], targets[rows], use_reentrant=False)
        loss = loss + chunk
    return loss
