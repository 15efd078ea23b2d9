"""Values that travel between parts.

Shapes, everywhere in this code: B rows, T tokens, V vocabulary, D width, N supervised tokens, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch
    from torch import Tensor

IGNORE_INDEX = -100
"""Label of a token that is not learnt from (as in torch and transformers)."""

Row = dict[str, Any]
"""One record of a data source, as read."""

Role = Literal["system", "user", "assistant", "tool", "text"]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. The role "text" is a verbatim piece: no template is put around it."""

    role: Role
    content: str
    train: bool
    """Whether the model learns to produce this content (and the end of the turn after it)."""


@dataclass(frozen=True, slots=True)
class Example:
    """One tokenized conversation or text. Labels are unshifted: labels[i] is input_ids[i] or IGNORE_INDEX."""

    input_ids: list[int]
    labels: list[int]

    @property
    def num_supervised(self) -> int:
        """Tokens that contribute to the loss. The first token has no predecessor to predict it from."""
        return sum(label != IGNORE_INDEX for label in self.labels[1:])


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the model is given at evaluation, and the answer that is due."""

    input_ids: list[int]
    reference: str


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch, right-padded."""

    input_ids: Tensor  # (B, T) int64
    attention_mask: Tensor  # (B, T) int64, 1 for real tokens
    labels: Tensor  # (B, T) int64, unshifted, IGNORE_INDEX where nothing is learnt

    def to(self, device: torch.device) -> Batch:
        return Batch(
            self.input_ids.to(device, non_blocking=True),
            self.attention_mask.to(device, non_blocking=True),
            self.labels.to(device, non_blocking=True),
        )


@dataclass(slots=True)
class TrainState:
    """What changes while training, apart from weights and optimizer. JSON-serializable."""

    step: int = 0
    """Optimizer steps done."""
    tokens: int = 0
    """Supervised tokens learnt from so far, over all ranks."""
    best_loss: float | None = None
    """Lowest evaluation loss so far."""
    best_step: int | None = None
    extra: dict[str, Any] = field(default_factory=dict)
