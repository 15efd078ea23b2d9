"""The cross-entropy of supervised tokens: the head runs at their positions only."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora_cli.common.decoder import decoder_of
from qlora_cli.kernels.cross_entropy import CrossEntropy, LossChunks, cross_entropy
from qlora_cli.kernels.head_loss import (
    checkpointed_losses,
    chunked_cross_entropy,
    head_loss,
    head_losses,
    vocabulary_size,
)
from qlora_cli.objectives.halves import run_halves
from qlora_cli.types import IGNORE_INDEX, Batch, copy_to

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger("qlora")

Factors = Callable[[Sequence[int]], Tensor | None]
"""Returns a factor for each supervised token, (N,), by their number in each example; None for 1."""


def no_factors(counts: Sequence[int]) -> None:
    """Leave every loss as it is."""


class TokenLosses:
    """Computes the cross-entropy of the supervised tokens of batches.

    The decoder runs on all tokens. The head runs on supervised positions only, chunk by chunk, so
    the peak is one chunk of logits and not B x T x V of them.

    Args:
        model: a causal language model, with or without PEFT around it.
        dtype: autocast dtype; float32 means no autocast.
        cross_entropy: kernel for the losses of a chunk of logits, with their gradient.
        chunks: rows of logits to compute at a time; None are those of the model's device.
    """

    def __init__(
        self,
        model: nn.Module,
        dtype: torch.dtype,
        cross_entropy: CrossEntropy = cross_entropy,
        chunks: LossChunks | None = None,
    ) -> None:
        self._model = model
        self._dtype = dtype
        self._cross_entropy = cross_entropy
        self._chunks = chunks or LossChunks.on(next(model.parameters()).device.type)
        causal: Any = without_adapter(model)
        self._halves: tuple[Any, Any] = decoder_of(causal), causal.get_output_embeddings()
        self.is_split = self._can_split(causal)
        if not self.is_split:
            log.info(
                "loss: the logits of all supervised tokens of a micro-batch are in memory at once, "
                "because %s changes them after its head, or has no separate head",
                type(causal).__name__,
            )

    def total(self, batch: Batch) -> Tensor:
        """Return the sum over all supervised tokens: a float32 scalar, with a gradient."""
        device = batch.input_ids.device
        with self._autocast(device):
            states, targets = self._inputs(batch, find_supervised(batch))
            if self.is_split:
                _, head = self._halves
                return head_loss(states, targets, head, self._cross_entropy, self._chunks)
            return chunked_cross_entropy(states, targets, self._chunks)

    def of_examples(self, batch: Batch, factors: Factors = no_factors) -> Tensor:
        """Return the sum over the supervised tokens of each example, (S,) float64, with a gradient.

        Args:
            factors: those of the tokens' losses.
        """
        device, found = batch.input_ids.device, find_supervised(batch)
        with self._autocast(device):
            states, targets = self._inputs(batch, found)
            if self.is_split:
                _, head = self._halves
                losses = head_losses(states, targets, head, self._cross_entropy, self._chunks)
            else:
                losses = checkpointed_losses(states, targets, nn.Identity(), self._chunks)
        if (each := factors(found.counts)) is not None:
            losses = losses * copy_to(device, each)
        # Example by example: on CUDA, adding at an index has no fixed order.
        return torch.stack([part.double().sum() for part in losses.split(found.counts)])

    def _inputs(self, batch: Batch, found: SupervisedTokens) -> tuple[Tensor, Tensor]:
        """Return the inputs of the head (N, D), or logits (N, V), and the targets (N,)."""
        device = batch.input_ids.device
        if not batch.prefixes:
            positions = copy_to(device, found.positions)
            return self._states(batch, positions), copy_to(device, found.targets)
        # The last token of a shared prompt predicts the first one of each answer.
        places, index = found.positions.unique(return_inverse=True)
        states = self._states(batch, copy_to(device, places))
        return states[copy_to(device, index)], copy_to(device, found.targets)

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
            width = vocabulary_size(head) if self.is_split else states.shape[-1]
            sums = torch.zeros(len(labels), dtype=torch.float64, device=device)
            # Without any label (on a rank without rows) there is no chunk.
            for at in self._chunks.split(len(targets), width):
                losses = F.cross_entropy(
                    head(states[index[at]]).float(), targets[at], reduction="none"
                )
                sums.index_add_(0, owners[at], losses.double())
        return sums

    def _autocast(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, self._dtype, enabled=self._dtype != torch.float32)

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
        logits: Tensor = self._model(**batch.inputs(), use_cache=False, logits_to_keep=keep).logits
        if logits.dim() == 3:  # the model (ProphetNet) ignores `logits_to_keep`
            return logits.flatten(0, 1)[positions]
        return logits

    def _can_split(self, causal: PreTrainedModel) -> bool:
        """Check that the model is decoder and head, with nothing (such as a soft cap) around."""
        decoder, head = self._halves
        if decoder is None or head is None:
            return False
        autocast = self._autocast(next(causal.parameters()).device)
        found = run_halves(causal, decoder, head, autocast)
        return (
            found is not None
            and torch.equal(found.decoded, found.read)
            and torch.equal(found.output, found.logits)
        )


@dataclass(frozen=True, slots=True)
class SupervisedTokens:
    """The supervised tokens of a batch, and where they are predicted. All is on the host."""

    positions: Tensor
    """(N,): the positions that predict them, of the flattened B * T."""
    targets: Tensor
    """(N,): the tokens."""
    counts: list[int]
    """Their number in each example."""


def find_supervised(batch: Batch) -> SupervisedTokens:
    """Find the supervised tokens of a batch, example by example."""
    positions, targets = supervised_positions(batch.labels)
    if not batch.documents:
        counts = (batch.labels[:, 1:] != IGNORE_INDEX).sum(1).tolist()
        return SupervisedTokens(positions, targets, counts)
    ends = list(accumulate(batch.documents))
    # The token at position p predicts the one at p + 1.
    owners = torch.searchsorted(torch.tensor(ends), positions + 1, right=True)
    counts = torch.bincount(owners, minlength=len(ends)).tolist()
    if any(batch.prefixes):
        positions = positions.clone()
        for document, last in _last_of_prompts(batch).items():
            is_first = positions == ends[document - 1] - 1
            positions[is_first & (owners == document)] = last
    return SupervisedTokens(positions, targets, counts)


def _last_of_prompts(batch: Batch) -> dict[int, int]:
    """Return the place of the last token of its prompt, for each document that is without it."""
    starts = [0, *accumulate(batch.documents)]
    firsts = list(accumulate(batch.links, initial=0))[:-1]
    owners = {
        document: first
        for first, number in zip(firsts, batch.links, strict=True)
        for document in range(first, first + number)
    }
    return {
        document: starts[owners[document]] + prefix - 1
        for document, prefix in enumerate(batch.prefixes)
        if prefix
    }


def without_adapter(model: nn.Module) -> Any:
    """Return the causal language model inside PEFT's wrapper, or the model itself."""
    from peft import PeftModel

    return model.get_base_model() if isinstance(model, PeftModel) else model


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
