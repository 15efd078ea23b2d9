"""Objectives of pairs: a chosen and a rejected answer to the same prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from qlora_cli.objectives.base import Objective, SumOverRanks
from qlora_cli.objectives.reference import Reference
from qlora_cli.objectives.token_losses import TokenLosses, find_supervised
from qlora_cli.types import Batch


@dataclass(frozen=True, slots=True)
class PairLogProbs:
    """Log-probabilities of the answers of P pairs, in nats; each tensor is (P,) float64."""

    chosen: Tensor
    rejected: Tensor
    chosen_tokens: Tensor
    """Supervised tokens of the chosen answers."""
    rejected_tokens: Tensor
    reference_chosen: Tensor
    """The same under the reference model; 0 for an objective without one."""
    reference_rejected: Tensor

    @property
    def chosen_ratio(self) -> Tensor:
        """Log-ratio of model and reference for the chosen answers."""
        return self.chosen - self.reference_chosen

    @property
    def rejected_ratio(self) -> Tensor:
        """Log-ratio of model and reference for the rejected answers."""
        return self.rejected - self.reference_rejected

    @property
    def chosen_mean(self) -> Tensor:
        """Mean log-probability of a token of the chosen answers."""
        return self.chosen / self.chosen_tokens

    @property
    def rejected_mean(self) -> Tensor:
        """Mean log-probability of a token of the rejected answers."""
        return self.rejected / self.rejected_tokens


@dataclass(frozen=True, slots=True)
class PairTerms:
    """Result of a preference loss for P pairs; each tensor is (P,)."""

    losses: Tensor
    chosen_rewards: Tensor
    """Implicit rewards of the chosen answers."""
    rejected_rewards: Tensor


PairLoss = Callable[[PairLogProbs], PairTerms]


class PreferenceLoss(Objective):
    """A loss of pairs, averaged over the pairs of a step.

    Args:
        model: the model that is trained, with its adapter, as it is before the first step.
        dtype: autocast dtype; float32 means no autocast.
        losses: computes the log-probabilities of answers.
        pair_loss: the loss of each pair, and the rewards that it implies.
        reference: what the model is compared with; None if the loss has no reference.
        tail_weight: factor on the log-probabilities of the tokens of an answer after as many as the
            shorter answer of its pair has (alpha of LD-DPO).
    """

    unit: ClassVar[str] = "pairs"

    def __init__(
        self,
        model: nn.Module,
        dtype: torch.dtype,
        losses: TokenLosses,
        pair_loss: PairLoss,
        *,
        reference: Reference | None,
        tail_weight: float = 1.0,
    ) -> None:
        super().__init__(model, dtype)
        self._losses = losses
        self._pair_loss = pair_loss
        self.reference = reference
        self._tail_weight = tail_weight

    def prepare(
        self, batches: Sequence[Batch], device: torch.device, sum_over_ranks: SumOverRanks
    ) -> list[Batch]:
        """Compute the log-probabilities under the reference, where they are not known yet."""
        if self.reference is None:
            return list(batches)
        return self.reference.add_to(batches, device, self, self.log_probs)

    def kept_tensors(self) -> list[Tensor]:
        """Return the copies of the trained weights."""
        return [] if self.reference is None else self.reference.copies

    def parts(self, batch: Batch) -> tuple[Batch, ...]:
        """Return the batches whose log-probabilities the reference computes: this one."""
        return (batch,)

    def log_probs(self, batch: Batch) -> Tensor:
        """Return the log-probability of each answer, (S,) in float64, with a gradient."""
        return -self._losses.of_examples(batch, self._factors)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss sum over pairs, and sums of the metrics."""
        terms, pairs = self._terms(batch)
        metrics = {name: value.float() for name, value in self._metrics(terms, pairs).items()}
        return terms.losses.sum().float(), metrics

    def weight(self, batch: Batch) -> int:
        """Count the pairs."""
        return len(batch.links)

    @torch.no_grad()
    def of_rows(self, batch: Batch) -> Tensor:
        """Return the loss of each pair at its chosen answer, (B,) in float64."""
        losses = self._terms(batch)[0].losses
        if batch.documents:
            return losses.sum()[None]
        shares = losses.new_zeros(len(batch.input_ids))
        shares[: 2 * len(losses) : 2] = losses
        return shares

    @torch.no_grad()
    def measured(self, batch: Batch) -> dict[str, Tensor]:
        """Return the sums of loss and metrics."""
        terms, pairs = self._terms(batch)
        return {"loss": terms.losses.sum(), **self._metrics(terms, pairs)}

    def _terms(self, batch: Batch) -> tuple[PairTerms, PairLogProbs]:
        pairs = self._pairs(batch)
        return self._pair_loss(pairs), pairs

    def _pairs(self, batch: Batch) -> PairLogProbs:
        """Compute the log-probabilities of the pairs in a batch; those of a dummy batch are none.

        A rank without pairs takes part in the backward pass with an empty sum.
        """
        number = 2 * len(batch.links)
        found = self.log_probs(batch)
        counts = torch.tensor(find_supervised(batch).counts[:number], dtype=torch.float64)
        tokens = counts.to(found.device)
        reference = torch.zeros_like(found)
        if self.reference is not None:
            assert batch.reference is not None, "prepare() computes it"
            reference = batch.reference
        columns = (found[:number], tokens, reference[:number])
        (chosen, rejected), (chosen_tokens, rejected_tokens), references = (
            (column[0::2], column[1::2]) for column in columns
        )
        return PairLogProbs(chosen, rejected, chosen_tokens, rejected_tokens, *references)

    def _factors(self, counts: Sequence[int]) -> Tensor | None:
        if self._tail_weight == 1.0:
            return None
        factors = []
        for at, count in enumerate(counts):
            other = counts[at ^ 1] if at ^ 1 < len(counts) else count
            kept = min(count, other)
            factors += [1.0] * kept + [self._tail_weight] * (count - kept)
        return torch.tensor(factors)

    def _metrics(self, terms: PairTerms, pairs: PairLogProbs) -> dict[str, Tensor]:
        margins = (terms.chosen_rewards - terms.rejected_rewards).detach()
        values = {
            "accuracy": (margins.sign() + 1) / 2,
            "margin": margins,
            "logp_chosen": pairs.chosen.detach(),
            "logp_rejected": pairs.rejected.detach(),
        }
        if self.reference is not None:
            values["chosen_change"] = pairs.chosen_ratio.detach()
            values["kl"] = (pairs.chosen_ratio + pairs.rejected_ratio).detach() / 2
        return {name: value.sum() for name, value in values.items()}
