"""Preference objectives: to add one, write a class with its `terms` here, and name it in the union.

Notation: pi is the model, rho the reference (the model before the first step), y_c the chosen and
y_r the rejected answer, log pi(y) the sum over the tokens of an answer, |y| their number.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from qlora_cli.common.formatting import value_text
from qlora_cli.objectives.settings import ObjectiveSettings, ReferenceMode
from qlora_cli.types import BAD, GOOD, Conversation, RowKind

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from qlora_cli.kernels.cross_entropy import CrossEntropy, LossChunks
    from qlora_cli.objectives.base import Objective
    from qlora_cli.objectives.preference import PairLogProbs, PairTerms

ReferenceChoice = Literal["auto", "live", "precomputed"]


class PairObjective(ObjectiveSettings):
    """An objective of pairs that is a function of the log-probabilities of their answers."""

    rows: ClassVar[RowKind] = "pairs"
    sft_weight: float = Field(0.0, ge=0)
    """Weight of the mean cross-entropy per token of the chosen answer, added to the loss of its
    pair. It keeps the chosen answers likely."""

    @property
    def metrics(self) -> tuple[str, ...]:
        return ("accuracy", "margin")

    max_fall: float = Field(20.0, gt=0)
    """Warn once when the chosen answers of the evaluation rows are less likely than at the start by
    more than this many nats per answer."""

    @property
    def tail_weight(self) -> float:
        """Factor on the log-probabilities of tokens beyond the length of the shorter answer."""
        return 1.0

    def terms(self, pairs: PairLogProbs) -> PairTerms:
        """Return the loss of each pair, and the rewards that it implies."""
        raise NotImplementedError

    def build(
        self,
        model: nn.Module,
        dtype: torch.dtype,
        cross_entropy: CrossEntropy,
        chunks: LossChunks | None = None,
        *,
        keeps_reference: bool = True,
    ) -> Objective:
        from qlora_cli.objectives.preference import PreferenceLoss
        from qlora_cli.objectives.reference import Reference
        from qlora_cli.objectives.token_losses import TokenLosses

        has_reference = self.reference_mode(trains_base=False) is not None
        return PreferenceLoss(
            model,
            dtype,
            TokenLosses(model, dtype, cross_entropy, chunks),
            self.terms_with_sft,
            reference=Reference(model, is_kept=keeps_reference) if has_reference else None,
            tail_weight=self.tail_weight,
        )

    def terms_with_sft(self, pairs: PairLogProbs) -> PairTerms:
        """Return the terms, with the cross-entropy of the chosen answers added to the losses."""
        from dataclasses import replace

        terms = self.terms(pairs)
        if not self.sft_weight:
            return terms
        return replace(terms, losses=terms.losses - self.sft_weight * pairs.chosen_mean)


class DPO(PairObjective):
    """Direct preference optimization (Rafailov et al. 2023, equation 7), and losses of its form.

    With h = log pi(y_c) / rho(y_c) - log pi(y_r) / rho(y_r), the loss of a pair is
    -log sigmoid(beta h) for `sigmoid`, max(0, 1 - beta h) for `hinge` (SLiC), and
    (h' - 1 / (2 beta))^2 for `ipo` (Azar et al. 2023, equation 17), where h' has the mean over the
    tokens of each answer instead of the sum.
    """

    type: Literal["dpo"] = "dpo"
    beta: float = Field(0.1, gt=0)
    """How closely the model is held to the reference: a larger value holds it closer."""
    loss: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"
    """The loss of a pair."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Share of pairs whose labels are assumed to be swapped: conservative DPO,
    -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h)."""
    ld_alpha: float = Field(1.0, ge=0, le=1)
    """Weight of the tokens of an answer beyond the length of the shorter one of its pair: with less
    than 1, longer answers gain less by their length (LD-DPO, Liu et al. 2024, equation 10)."""
    reference: ReferenceChoice = "auto"
    """`live` computes the reference in each step, with a copy of the trained weights; `precomputed`
    computes it once before the first step. `auto` is precomputed where weights of the base are
    trained, and live otherwise."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.label_smoothing and self.loss != "sigmoid":
            raise ValueError(
                f"label_smoothing ({self.label_smoothing:g}) is defined for loss sigmoid; found "
                f"{value_text(self.loss)}"
            )
        return self

    def reference_mode(self, *, trains_base: bool) -> ReferenceMode | None:
        return _mode(self.reference, trains_base=trains_base)

    @property
    def tail_weight(self) -> float:
        return self.ld_alpha

    def terms(self, pairs: PairLogProbs) -> PairTerms:
        import torch.nn.functional as F

        from qlora_cli.objectives.preference import PairTerms

        chosen, rejected = pairs.chosen_ratio, pairs.rejected_ratio
        if self.loss == "ipo":
            chosen, rejected = chosen / pairs.chosen_tokens, rejected / pairs.rejected_tokens
            losses = (chosen - rejected - 1 / (2 * self.beta)).square()
            return PairTerms(losses, self.beta * chosen, self.beta * rejected)
        logits, e = self.beta * (chosen - rejected), self.label_smoothing
        if self.loss == "hinge":
            losses = F.relu(1 - logits)
        else:
            losses = -(1 - e) * F.logsigmoid(logits) - e * F.logsigmoid(-logits)
        return PairTerms(losses, self.beta * chosen, self.beta * rejected)


class ORPO(PairObjective):
    """Odds ratio preference optimization (Hong et al. 2024, equation 6): needs no reference.

    The loss of a pair is the mean cross-entropy per token of y_c, plus beta times
    -log sigmoid(log odds(y_c) - log odds(y_r)), where odds(y) = p / (1 - p) and log p is the mean
    log-probability of a token of y.
    """

    type: Literal["orpo"] = "orpo"
    beta: float = Field(0.1, gt=0)
    """Weight of the odds ratio (lambda in the paper)."""
    sft_weight: float = Field(1.0, ge=0)
    """Weight of the mean cross-entropy per token of the chosen answer."""

    def terms(self, pairs: PairLogProbs) -> PairTerms:
        import torch.nn.functional as F

        from qlora_cli.objectives.preference import PairTerms

        chosen, rejected = pairs.chosen_mean, pairs.rejected_mean
        log_ratio = (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))
        losses = -self.beta * F.logsigmoid(log_ratio)
        return PairTerms(losses, self.beta * chosen, self.beta * rejected)


class SimPO(PairObjective):
    """Simple preference optimization (Meng et al. 2024, equation 6): needs no reference.

    The loss of a pair is -log sigmoid(beta (log pi(y_c) / |y_c| - log pi(y_r) / |y_r|) - gamma).
    """

    type: Literal["simpo"] = "simpo"
    beta: float = Field(2.0, gt=0)
    """Factor on the mean log-probabilities."""
    gamma: float = Field(0.5, ge=0)
    """Margin by which the chosen answer has to be better, in units of beta times log-probability
    per token."""

    def terms(self, pairs: PairLogProbs) -> PairTerms:
        import torch.nn.functional as F

        from qlora_cli.objectives.preference import PairTerms

        chosen, rejected = self.beta * pairs.chosen_mean, self.beta * pairs.rejected_mean
        return PairTerms(-F.logsigmoid(chosen - rejected - self.gamma), chosen, rejected)


class KTO(ObjectiveSettings):
    """Kahneman-Tversky optimization (Ethayarajh et al. 2024, equation 8): needs no pairs.

    With r = log pi(y) / rho(y), the loss of a row is w_D (1 - sigmoid(beta (r - z))) if its answer
    is good and w_U (1 - sigmoid(beta (z - r))) if not. z estimates the divergence from the
    reference: the mean of r over the prompts of the step, each with the answer of the row before
    it, but at least 0.
    """

    rows: ClassVar[RowKind] = "feedback"
    type: Literal["kto"] = "kto"
    beta: float = Field(0.1, gt=0)
    """How closely the model is held to the reference: a larger value holds it closer."""
    desirable_weight: float = Field(1.0, gt=0)
    """Weight of good answers (w_D). With n_D good and n_U bad answers, w_D n_D / (w_U n_U) should
    be between 1 and 4/3."""
    undesirable_weight: float = Field(1.0, gt=0)
    """Weight of bad answers (w_U)."""
    reference: ReferenceChoice = "auto"
    """The same as in `dpo`."""

    @property
    def metrics(self) -> tuple[str, ...]:
        return ("accuracy", "margin")

    def reference_mode(self, *, trains_base: bool) -> ReferenceMode | None:
        return _mode(self.reference, trains_base=trains_base)

    def values_of(self, row: Conversation) -> tuple[float, ...]:
        return (float(row.label is True),)

    def label_text(self, values: tuple[float, ...]) -> str:
        return GOOD if values[0] else BAD

    def label_remark(self, labels: Mapping[str, int]) -> str | None:
        good = self.desirable_weight * labels.get(GOOD, 0)
        bad = self.undesirable_weight * labels.get(BAD, 0)
        if not good or not bad or bad <= good <= 4 / 3 * bad:
            return None
        name, weight = (
            ("desirable_weight", self.desirable_weight * bad / good)
            if good < bad
            else ("undesirable_weight", self.undesirable_weight * good / bad)
        )
        return (
            f"w_D n_D / (w_U n_U) is {good / bad:.3g} and should be between 1 and 4/3: "
            f"objective.{name}: {weight:.3g} makes it 1"
        )

    @property
    def example_values(self) -> tuple[float, ...]:
        return (1.0,)

    def build(
        self,
        model: nn.Module,
        dtype: torch.dtype,
        cross_entropy: CrossEntropy,
        chunks: LossChunks | None = None,
        *,
        keeps_reference: bool = True,
    ) -> Objective:
        from qlora_cli.objectives.feedback import FeedbackLoss, FeedbackWeights
        from qlora_cli.objectives.reference import Reference
        from qlora_cli.objectives.token_losses import TokenLosses

        return FeedbackLoss(
            model,
            dtype,
            TokenLosses(model, dtype, cross_entropy, chunks),
            FeedbackWeights(self.beta, self.desirable_weight, self.undesirable_weight),
            Reference(model, is_kept=keeps_reference),
        )


def _mode(choice: ReferenceChoice, *, trains_base: bool) -> ReferenceMode:
    """Choose for `auto`: a copy of the weights of an adapter is small, one of a base is not."""
    if choice == "auto":
        return "precomputed" if trains_base else "live"
    return choice


def _log1mexp(x: Tensor) -> Tensor:
    """Compute log(1 - exp(x)) for x < 0 (Maechler 2012): accurate near 0 and far from it."""
    import math

    import torch

    near = torch.log(-torch.expm1(x.clamp(min=-math.log(2))))
    far = torch.log1p(-torch.exp(x.clamp(max=-math.log(2))))
    return torch.where(x > -math.log(2), near, far)
