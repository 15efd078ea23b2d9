"""The objectives. To add one: a module in a file here, and a settings class in the union below."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from qlora_cli.objectives.head_settings import Classify, Reward
from qlora_cli.objectives.preference_settings import DPO, KTO, ORPO, SimPO
from qlora_cli.objectives.settings import ObjectiveSettings

if TYPE_CHECKING:
    import torch
    from torch import nn

    from qlora_cli.kernels.cross_entropy import CrossEntropy, LossChunks
    from qlora_cli.objectives.base import Objective

__all__ = [
    "DPO",
    "KTO",
    "ORPO",
    "SUPERVISED",
    "Classify",
    "ObjectiveConfig",
    "ObjectiveSettings",
    "Reward",
    "SimPO",
    "Supervised",
]


class Supervised(ObjectiveSettings):
    """Supervised fine-tuning: the cross-entropy of each supervised token."""

    type: Literal["supervised"] = "supervised"

    @property
    def metrics(self) -> tuple[str, ...]:
        return ("perplexity",)

    def build(
        self,
        model: nn.Module,
        dtype: torch.dtype,
        cross_entropy: CrossEntropy,
        chunks: LossChunks | None = None,
        *,
        keeps_reference: bool = True,
    ) -> Objective:
        from qlora_cli.objectives.supervised import TokenLoss

        return TokenLoss(model, dtype, cross_entropy, chunks)


SUPERVISED = Supervised()
"""The objective of a recipe that names none."""

ObjectiveConfig = Annotated[
    Supervised | DPO | ORPO | SimPO | KTO | Reward | Classify, Field(discriminator="type")
]
