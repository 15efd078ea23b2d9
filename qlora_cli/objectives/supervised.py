"""Supervised fine-tuning: token cross-entropy, at the supervised positions only."""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qlora_cli.common.decoder import decoder_of
from qlora_cli.common.eval_mode import eval_mode
from qlora_cli.kernels.cross_entropy import CrossEntropy, LossChunks, cross_entropy
from qlora_cli.objectives.base import Objective
from qlora_cli.types import IGNORE_INDEX, Batch, copy_to

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger("qlora")


class TokenLoss(Objective):
    """Cross-entropy, summed over the supervised tokens of a micro-batch.

    The decoder runs on all tokens. The head runs on supervised positions only, chunk by chunk, so
    the peak is one chunk of logits and not B x T x V of them.

    Args:
        model: a causal language model, with or without PEFT around it.
        dtype: autocast dtype; float32 means no autocast.
        cross_entropy: kernel for the loss of a chunk of logits, with its gradient.
        chunks: rows of logits to compute at a time; None are those of the model's device.
    """

    unit: ClassVar[str] = "supervised_tokens"

    def __init__(
        self,
        model: nn.Module,
        dtype: torch.dtype,
        cross_entropy: CrossEntropy = cross_entropy,
        chunks: LossChunks | None = None,
    ) -> None:
        super().__init__(model, dtype)
        self._cross_entropy = cross_entropy
        self._chunks = chunks or LossChunks.on(next(model.parameters()).device.type)
        causal: Any = _without_adapter(model)
        # In a tuple, so that they are not registered again: both are inside the model already.
        self._halves: tuple[Any, Any] = decoder_of(causal), causal.get_output_embeddings()
        self.is_split = self._can_split(causal)
        if not self.is_split:
            log.info(
                "loss: the logits of all supervised tokens of a micro-batch are in memory at once, "
                "because %s changes them after its head, or has no separate head",
                type(causal).__name__,
            )

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss sum; there are no metrics."""
        return self._loss_sum(batch), {}

    def weight(self, batch: Batch) -> int:
        """Count the supervised tokens."""
        return batch.num_supervised

    def _loss_sum(self, batch: Batch) -> Tensor:
        device = batch.input_ids.device
        # Labels stay on the host, so finding the positions does not wait for the device.
        positions, targets = (
            copy_to(device, index) for index in supervised_positions(batch.labels)
        )
        with self._autocast(device):
            states = self._states(batch, positions)
            if self.is_split:
                _, head = self._halves
                return head_loss(states, targets, head, self._cross_entropy, self._chunks)
            return _chunked_cross_entropy(states, targets, self._chunks)

    def of_rows(self, batch: Batch) -> Tensor:
        """Return the loss sum of each row, (B,) in float64, without a gradient."""
        return self.of_labels(batch, batch.labels, torch.arange(len(batch.labels)))

    @torch.no_grad()
    def of_labels(self, batch: Batch, labels: Tensor, rows: Tensor) -> Tensor:
        """Return the loss sum of several label sequences on the same rows, (L,) in float64.

        Args:
            labels: (L, T), on the host.
            rows: (L,), the row of the batch that each label sequence belongs to.
        """
        device, length = batch.input_ids.device, batch.input_ids.shape[1]
        positions, targets = supervised_positions(labels)
        owners = positions // length
        places, index = (rows[owners] * length + positions % length).unique(return_inverse=True)
        places, index, targets, owners = (x.to(device) for x in (places, index, targets, owners))
        with self._autocast(device):
            states = self._states(batch, places)
            head: Any = self._halves[1] if self.is_split else nn.Identity()
            width = _vocabulary_size(head) if self.is_split else states.shape[-1]
            sums = torch.zeros(len(labels), dtype=torch.float64, device=device)
            # Without any label (on a rank without rows) there is no chunk.
            for at in self._chunks.split(len(targets), width):
                losses = F.cross_entropy(
                    head(states[index[at]]).float(), targets[at], reduction="none"
                )
                sums.index_add_(0, owners[at], losses.double())
        return sums

    def _autocast(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32)

    def _states(self, batch: Batch, positions: Tensor) -> Tensor:
        """Return the input of the head (N, D), or logits (N, V) if the model cannot be split.

        Args:
            positions: (N,), ascending: the positions, of B * T, that predict a supervised token.
        """
        if self.is_split:
            decoder, _ = self._halves
            hidden = decoder(**batch.inputs(), use_cache=False).last_hidden_state  # (B, T, D)
            states: Tensor = hidden.flatten(0, 1)[positions]
            return states
        # The model's own forward, with logits at these positions only.
        keep = torch.zeros_like(batch.input_ids, dtype=torch.bool)
        keep.view(-1)[positions] = True
        logits: Tensor = self.model(**batch.inputs(), use_cache=False, logits_to_keep=keep).logits
        if logits.dim() == 3:  # the model (ProphetNet) ignores `logits_to_keep`
            return logits.flatten(0, 1)[positions]
        return logits

    @torch.no_grad()
    def _can_split(self, causal: PreTrainedModel) -> bool:
        """Check that the model is decoder and head, with nothing (such as a soft cap) around.

        All values are from one forward pass: a second one may round otherwise on a GPU.
        """
        decoder, head = self._halves
        if decoder is None or head is None:
            return False
        device = next(causal.parameters()).device
        input_ids = torch.arange(1, 5, device=device)[None]  # (1, 4)
        seen: dict[str, Any] = {}

        def keep(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
            seen[name] = inputs, output

        hooks = [
            half.register_forward_hook(partial(keep, name))
            for name, half in (("decoder", decoder), ("head", head))
        ]
        try:
            with eval_mode(causal), self._autocast(device):
                logits = causal(input_ids=input_ids, use_cache=False).logits
        finally:
            for hook in hooks:
                hook.remove()
        if seen.keys() != {"decoder", "head"}:
            return False
        (states, *_), output = seen["head"]
        return torch.equal(seen["decoder"][1].last_hidden_state, states) and torch.equal(
            output, logits
        )


def _without_adapter(model: nn.Module) -> Any:
    """Return the causal language model inside PEFT's wrapper, or the model itself."""
    from peft import PeftModel

    return model.get_base_model() if isinstance(model, PeftModel) else model


def _vocabulary_size(head: nn.Module) -> int:
    """Return the number of logits of a head, with or without PEFT's wrapper around it."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    inner: Any = head
    if isinstance(head, AuxiliaryTrainingWrapper):
        inner = head.original_module
    elif isinstance(head, BaseTunerLayer):
        inner = head.get_base_layer()
    return int(inner.out_features)


def supervised_positions(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Find the positions that predict a supervised token.

    Args:
        labels: (B, T), unshifted.

    Returns:
        The N positions, as indices into the flattened B * T (each is one before its target), and
        the N targets.
    """
    shifted = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)  # token t predicts token t + 1
    positions = (shifted != IGNORE_INDEX).flatten().nonzero().squeeze(-1)
    return positions, shifted.flatten()[positions]


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
        for rows in chunks.split(len(targets), _vocabulary_size(head)):
            with torch.set_grad_enabled(wanted):
                states = hidden[rows].detach().requires_grad_(wanted)
                logits = head(states)  # (n, V)
            chunk, grad_logits = cross_entropy(logits.detach(), targets[rows])
            loss += chunk
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


def _chunked_cross_entropy(logits: Tensor, targets: Tensor, chunks: LossChunks) -> Tensor:
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
