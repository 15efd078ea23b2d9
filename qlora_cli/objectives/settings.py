"""The base of the recipe section `objective`: what a run learns from its rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from qlora_cli.common.config import Config
from qlora_cli.types import Conversation, HeadSpec, RowKind

if TYPE_CHECKING:
    import torch
    from torch import nn

    from qlora_cli.kernels.cross_entropy import CrossEntropy, LossChunks
    from qlora_cli.objectives.base import Objective


ReferenceMode = Literal["live", "precomputed"]


class ObjectiveSettings(Config):
    """The loss that training minimizes, and the rows that it needs for it."""

    rows: ClassVar[RowKind] = "answers"
    """Content that each row must have."""
    type: str

    @property
    def metrics(self) -> tuple[str, ...]:
        """Measures in addition to the loss: names that `evaluation.best_by` takes."""
        return ()

    @property
    def head(self) -> HeadSpec | None:
        """The head that the model needs; None for the one that predicts tokens."""
        return None

    @property
    def data_key(self) -> dict[str, Any]:
        """The settings that affect how rows are prepared, for the key of what is kept."""
        head = self.head
        return {"rows": self.rows, "head": None if head is None else asdict(head)}

    def reference_mode(self, *, trains_base: bool) -> ReferenceMode | None:
        """Return when the reference is computed: the model before the first step.

        Args:
            trains_base: weights of the base are trained.

        Returns:
            None for a loss without a reference.
        """
        return None

    def values_of(self, row: Conversation) -> tuple[float, ...]:
        """Return what the objective learns from a row in addition to its tokens.

        Every row gives the same number of values.

        Raises:
            DataError: the row has no label that the objective knows.
        """
        return ()

    @property
    def link_size(self) -> int:
        """Examples in a link of its batches."""
        return 2 if self.rows in ("pairs", "feedback") else 1

    @property
    def example_values(self) -> tuple[float, ...]:
        """The values of some row, for a plan without rows."""
        return ()

    def label_text(self, values: tuple[float, ...]) -> str | None:
        """Return the label of a row as text, from its values; None if its rows have none."""
        return None

    def label_remark(self, labels: Mapping[str, int]) -> str | None:
        """Say what to change for these numbers of training rows with each label, if anything."""
        return None

    def build(
        self,
        model: nn.Module,
        dtype: torch.dtype,
        cross_entropy: CrossEntropy,
        chunks: LossChunks | None = None,
        *,
        keeps_reference: bool = True,
    ) -> Objective:
        """Build the objective.

        Args:
            model: the model that is trained, with its adapter, as it is before the first step.
            dtype: autocast dtype; float32 means no autocast.
            cross_entropy: kernel for the loss of a chunk of logits, with its gradient.
            chunks: rows of logits to compute at a time; None are those of the model's device.
            keeps_reference: an objective with a reference keeps a copy of the weights that are
                trained. Without it, the batches have to bring what the reference says.
        """
        raise NotImplementedError
