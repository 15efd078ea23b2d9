"""Objective of feedback: answers that are good or bad, each to a prompt of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from qlora_cli.common.eval_mode import eval_mode
from qlora_cli.objectives.base import Objective, SumOverRanks
from qlora_cli.objectives.reference import Reference
from qlora_cli.objectives.token_losses import TokenLosses
from qlora_cli.types import Batch, copy_to


@dataclass(frozen=True, slots=True)
class FeedbackWeights:
    """Settings of the loss of Ethayarajh et al. 2024."""

    beta: float
    desirable: float
    undesirable: float


class FeedbackLoss(Objective):
    """Kahneman-Tversky optimization (Ethayarajh et al. 2024, equation 8).

    In each batch an example is followed, in the same link, by its prompt with the answer of another
    row of the step. The mean log-ratio of those estimates the divergence from the reference.

    Args:
        model: the model that is trained, with its adapter, as it is before the first step.
        dtype: autocast dtype; float32 means no autocast.
        losses: computes the log-probabilities of answers.
        weights: settings of the loss.
        reference: what the model is compared with.
    """

    unit: ClassVar[str] = "rows"

    def __init__(
        self,
        model: nn.Module,
        dtype: torch.dtype,
        losses: TokenLosses,
        weights: FeedbackWeights,
        reference: Reference,
    ) -> None:
        super().__init__(model, dtype)
        self._losses = losses
        self._weights = weights
        self.reference = reference

    @torch.no_grad()
    def prepare(
        self, batches: Sequence[Batch], device: torch.device, sum_over_ranks: SumOverRanks
    ) -> list[Batch]:
        """Compute log-probabilities under the reference, and the divergence over all batches.

        The mismatched answers serve for nothing else, so the batches are returned without them.
        """
        split = [self.parts(batch) for batch in batches]
        answers, others = (
            self.reference.add_to(part, device, self, self.log_probs)
            for part in ([one for one, _ in split], [other for _, other in split])
        )
        sums = torch.zeros(2, dtype=torch.float64, device=device)
        with eval_mode(self):
            for batch in others:
                assert batch.reference is not None
                number = len(batch.values)
                ratios = (self.log_probs(batch.to(device)) - batch.reference)[:number]
                sums += torch.stack([ratios.sum(), ratios.new_tensor(number)])
        total, number_of_rows = sum_over_ranks(sums)
        divergence = (total / number_of_rows).clamp(min=0)
        return [replace(batch, divergence=divergence) for batch in answers]

    def kept_tensors(self) -> list[Tensor]:
        """Return the copies of the trained weights."""
        return self.reference.copies

    def parts(self, batch: Batch) -> tuple[Batch, Batch]:
        """Split a batch into its examples, and their prompts with the answers of others."""
        return _one_of_each_link(batch, 0), _one_of_each_link(batch, 1)

    def log_probs(self, batch: Batch) -> Tensor:
        """Return the log-probability of each answer, (S,) in float64, with a gradient."""
        return -self._losses.of_examples(batch)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss sum over rows, and sums of metrics."""
        losses, metrics = self._terms(batch)
        return losses.sum().float(), {name: value.float() for name, value in metrics.items()}

    def weight(self, batch: Batch) -> int:
        """Count the rows."""
        return len(batch.values)

    @torch.no_grad()
    def of_rows(self, batch: Batch) -> Tensor:
        """Return the loss of each row, (B,) in float64."""
        losses, _ = self._terms(batch)
        if batch.documents:
            return losses.sum()[None]
        shares = losses.new_zeros(len(batch.input_ids))
        shares[: len(losses)] = losses
        return shares

    @torch.no_grad()
    def measured(self, batch: Batch) -> dict[str, Tensor]:
        """Return the sums of loss and metrics."""
        losses, metrics = self._terms(batch)
        return {"loss": losses.sum(), **metrics}

    def _terms(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the losses (P,), and sums of metrics."""
        assert batch.reference is not None, "prepare() computes it"
        assert batch.divergence is not None, "prepare() computes it"
        number, weights = len(batch.values), self._weights
        ratios = self.log_probs(batch)[:number] - batch.reference[:number]
        # 1 for a good answer, -1 for a bad one.
        signs = torch.tensor([1.0 if value > 0 else -1.0 for (value,) in batch.values])
        signs = copy_to(ratios.device, signs.double())
        weight = torch.where(signs > 0, weights.desirable, weights.undesirable)
        gains = torch.sigmoid(signs * weights.beta * (ratios - batch.divergence))
        margins = signs * weights.beta * ratios.detach()
        metrics = {
            # As for pairs: a reward of 0 counts half.
            "accuracy": ((margins.sign() + 1) / 2).sum(),
            "margin": margins.sum(),
            "kl": batch.divergence * number,
        }
        return weight * (1 - gains), metrics


def _one_of_each_link(batch: Batch, place: int) -> Batch:
    """Return a batch with one example of each link of two; one without rows stays as it is."""
    if not batch.links:
        return batch
    kept = [2 * at + place for at in range(len(batch.links))]
    reference = batch.reference
    if reference is not None:
        batch = replace(batch, reference=reference[kept])
    if batch.documents:
        ids = batch.input_ids[0].split(batch.documents)
        labels = batch.labels[0].split(batch.documents)
        return replace(
            batch,
            input_ids=torch.cat([ids[at] for at in kept])[None],
            labels=torch.cat([labels[at] for at in kept])[None],
            documents=tuple(batch.documents[at] for at in kept),
            links=(),
        )
    assert batch.attention_mask is not None
    return replace(
        batch,
        input_ids=batch.input_ids[kept],
        attention_mask=batch.attention_mask[kept],
        labels=batch.labels[kept],
        links=(),
    )
