"""Objectives of a head that scores whole rows: classification, regression and reward models."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from qlora_cli.common.formatting import first_names
from qlora_cli.errors import DataError
from qlora_cli.objectives.settings import ObjectiveSettings
from qlora_cli.types import Conversation, HeadSpec, Problem, RowKind, copy_to

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from qlora_cli.kernels.cross_entropy import CrossEntropy, LossChunks
    from qlora_cli.objectives.base import Objective
    from qlora_cli.objectives.classification import HeadTerms

_MAX_NAMED = 10


class Classify(ObjectiveSettings):
    """A head that predicts the label of a row from the hidden state of its last token.

    With z the K outputs of the head for a row, the loss of the row is -log softmax(z)_y for
    `single`, the mean over labels k of -y_k log sigmoid(z_k) - (1 - y_k) log sigmoid(-z_k) for
    `multi`, and (z - y)^2 for `regression`, as in transformers' `...ForSequenceClassification`. The
    loss of a step is the mean over its rows.
    """

    rows: ClassVar[RowKind] = "labels"
    type: Literal["classify"] = "classify"
    labels: list[str] = Field([])
    """The classes, in the order of the outputs. A row names its label, or gives its index (the
    first is 0). For `regression`, the name of the number; it can be left out."""
    problem: Problem = "single"
    """`single` predicts one label per row, `multi` any number of them, `regression` a number."""
    class_weights: dict[str, float] = Field({})
    """Label -> factor on its loss: for `single`, of the rows with this label; for `multi`, of this
    label in each row. Labels that are missing have the factor 1."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        labels, problem = self.labels, self.problem
        least = {"single": 2, "multi": 1, "regression": 0}[problem]
        if len(labels) < least:
            raise ValueError(
                f"labels: {len(labels)} given; problem {problem} needs at least {least}, e.g. "
                "labels: [negative, positive]"
            )
        if problem == "regression" and len(labels) > 1:
            raise ValueError(
                f"labels: {len(labels)} given; problem regression predicts one number: name it, or "
                "leave labels out"
            )
        if twice := [label for label, count in Counter(labels).items() if count > 1]:
            raise ValueError(f"labels: {twice[0]!r} is there twice")
        if "" in labels:
            raise ValueError("labels: one of them is empty")
        weights = self.class_weights
        if weights and problem == "regression":
            raise ValueError("class_weights: a number has no class; remove it")
        if unknown := sorted(set(weights) - set(labels)):
            raise ValueError(f"class_weights: {unknown[0]!r} is not one of labels")
        if bad := [label for label, one in weights.items() if not 0 < one < math.inf]:
            raise ValueError(
                f"class_weights: {bad[0]!r} has {weights[bad[0]]:g}; it takes a number above 0"
            )
        return self

    @property
    def head(self) -> HeadSpec:
        return HeadSpec(tuple(self.labels) or ("value",), self.problem)

    @property
    def metrics(self) -> tuple[str, ...]:
        is_number = self.problem == "regression"
        return ("mae", "spearman") if is_number else ("accuracy", "macro_f1", "auroc")

    @property
    def example_values(self) -> tuple[float, ...]:
        return (0.0,) * (len(self.labels) if self.problem == "multi" else 1)

    def values_of(self, row: Conversation) -> tuple[float, ...]:
        label = row.label
        if self.problem == "regression":
            # In csv files, every value is text.
            number = _number(label) if isinstance(label, str) else label
            if isinstance(number, bool) or not isinstance(number, int | float):
                raise DataError(f"label: {_shown(label)} is not a number")
            label = number
            if not math.isfinite(label):
                raise DataError(f"label: {label} is not a finite number")
            return (float(label),)
        if self.problem == "multi":
            if isinstance(label, str):
                label = (label,)
            if not isinstance(label, tuple):
                raise DataError(f"label: {_shown(label)} is not a list of labels")
            found = {self._index(one) for one in label}
            return tuple(float(i in found) for i in range(len(self.labels)))
        return (float(self._index(label)),)

    def label_text(self, values: tuple[float, ...]) -> str:
        if self.problem == "regression":
            return f"{values[0]:.6g}"
        if self.problem == "single":
            return self.labels[int(values[0])]
        given = [label for label, value in zip(self.labels, values, strict=True) if value]
        return " + ".join(given) or "none"

    def label_remark(self, labels: Mapping[str, int]) -> str | None:
        if self.problem == "regression":
            return None
        found = {self._index(label) for label in labels}
        absent = [repr(label) for i, label in enumerate(self.labels) if i not in found]
        return f"no row has the label {first_names(absent, _MAX_NAMED)}" if absent else None

    def _index(self, label: object) -> int:
        """Return the index of a label: its name, or that index itself."""
        if isinstance(label, str):
            if label in self.labels:
                return self.labels.index(label)
            if label.strip().isdecimal() and int(label) < len(self.labels):
                return int(label)
        if isinstance(label, tuple):
            raise DataError(
                f"label: {list(label)} is a list, and problem single has one label per row; "
                "problem multi takes lists"
            )
        if isinstance(label, int | float):
            if (text := _plain(label)) in self.labels:
                return self.labels.index(text)
            is_whole = math.isfinite(label) and label == int(label)
            if is_whole and not isinstance(label, bool) and 0 <= label < len(self.labels):
                return int(label)
        known = ", ".join(self.labels[:_MAX_NAMED])
        known += ", ..." if len(self.labels) > _MAX_NAMED else ""
        raise DataError(f"label: {_shown(label)} is not one of objective.labels ({known})")

    def build(
        self,
        model: nn.Module,
        dtype: torch.dtype,
        cross_entropy: CrossEntropy,
        chunks: LossChunks | None = None,
        *,
        keeps_reference: bool = True,
    ) -> Objective:
        from qlora_cli.objectives.classification import HeadLoss

        return HeadLoss(model, dtype, self.terms)

    def terms(self, outputs: Tensor, values: Tensor) -> HeadTerms:
        """Return the loss of each row, and if it is predicted right, or by how much not.

        Args:
            outputs: (R, K).
            values: (R, n), those of `values_of`.
        """
        import torch.nn.functional as F

        from qlora_cli.objectives.classification import HeadTerms

        weights = self._weights(outputs)
        if self.problem == "regression":
            errors = outputs - values.reshape(outputs.shape)
            return HeadTerms(errors.square().mean(1), {"mae": errors.abs().mean(1)})
        if self.problem == "multi":
            values = values.reshape(outputs.shape)
            losses = F.binary_cross_entropy_with_logits(
                outputs, values, weight=weights, reduction="none"
            )
            is_right = ((outputs > 0) == (values > 0)).all(1)
            return HeadTerms(losses.mean(1), {"accuracy": is_right.float()})
        labels = values.reshape(-1).long()
        losses = F.cross_entropy(outputs, labels, weight=weights, reduction="none")
        return HeadTerms(losses, {"accuracy": (outputs.argmax(1) == labels).float()})

    def _weights(self, outputs: Tensor) -> Tensor | None:
        """Return the factor on the loss of each label, (K,); None for 1."""
        if not self.class_weights:
            return None
        weights = [self.class_weights.get(label, 1.0) for label in self.labels]
        return copy_to(outputs.device, outputs.new_tensor(weights, device="cpu"))


class Reward(ObjectiveSettings):
    """A reward model: a head with one output that is larger for the chosen answer of a pair.

    With s_c and s_r the outputs for the conversations with the chosen and the rejected answer, the
    loss of a pair is -log sigmoid(s_c - s_r - margin) + center_rewards (s_c + s_r)^2: the model of
    Bradley and Terry (1952) as in Ouyang et al. (2022, https://arxiv.org/abs/2203.02155, equation
    1), the margin as in Llama 2 (Touvron et al. 2023, https://arxiv.org/abs/2307.09288, equation
    2), and the centering as in Eisenstein et al. (2023, https://arxiv.org/abs/2312.09244). The
    loss of a step is the mean over its pairs.
    """

    rows: ClassVar[RowKind] = "pairs"
    type: Literal["reward"] = "reward"
    center_rewards: float = Field(0.0, ge=0)
    """Weight of the squared sum of both rewards: it keeps rewards near 0, so that those of
    different prompts can be compared. The authors suggest 0.01."""

    @property
    def head(self) -> HeadSpec:
        return HeadSpec(("reward",), "regression")

    @property
    def metrics(self) -> tuple[str, ...]:
        return ("accuracy", "margin")

    @property
    def example_values(self) -> tuple[float, ...]:
        return (0.0,)

    def values_of(self, row: Conversation) -> tuple[float, ...]:
        """Return by how much the chosen answer should be better: the row's margin, or 0."""
        return (row.margin or 0.0,)

    def build(
        self,
        model: nn.Module,
        dtype: torch.dtype,
        cross_entropy: CrossEntropy,
        chunks: LossChunks | None = None,
        *,
        keeps_reference: bool = True,
    ) -> Objective:
        from qlora_cli.objectives.classification import HeadPairLoss

        return HeadPairLoss(model, dtype, self.terms)

    def terms(self, outputs: Tensor, values: Tensor) -> HeadTerms:
        """Return the loss of each pair, how often the chosen answer wins, and by how much.

        Args:
            outputs: (2 P, 1), those of the chosen and the rejected answer of each pair in turn.
            values: (P, 1), the margins.
        """
        import torch.nn.functional as F

        from qlora_cli.objectives.classification import HeadTerms

        chosen, rejected = outputs[0::2, 0], outputs[1::2, 0]
        margins = chosen - rejected
        losses = -F.logsigmoid(margins - values.reshape(margins.shape))
        if self.center_rewards:
            losses = losses + self.center_rewards * (chosen + rejected).square()
        return HeadTerms(losses, {"accuracy": (margins.sign() + 1) / 2, "margin": margins})


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _plain(number: float) -> str:
    """Return a number as a label is written: 1, not 1.0; true, not True."""
    if isinstance(number, bool):
        return str(number).lower()
    is_whole = math.isfinite(number) and number == int(number)
    return str(int(number)) if is_whole else str(number)


def _shown(label: object) -> str:
    if label is None:
        return "missing, which"
    shown = _plain(label) if isinstance(label, int | float) and math.isfinite(label) else label
    return repr(shown)[:80]
