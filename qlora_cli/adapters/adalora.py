"""LoRA whose ranks go where they matter."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from qlora_cli.adapters.lora import LowRank, linear_updates
from qlora_cli.adapters.peft_base import save_adapter

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch import nn
    from transformers import PreTrainedModel

    from qlora_cli.types import StepHooks

_DEVIATION = 0.02
"""Of the first directions, as in PEFT and in the paper's own code."""


class AdaLoRA(LowRank):
    """Low-rank adaptation that begins with more ranks than it keeps: the least important ones of
    all updates are taken away (AdaLoRA, Zhang et al. 2023, https://arxiv.org/abs/2303.10512)."""

    no_averaging: ClassVar[str] = "ranks that were taken away would come back with the average"
    type: Literal["adalora"] = "adalora"
    r: int = Field(12, ge=1)
    """Rank of each update at the beginning."""
    target_r: int = Field(8, ge=1)
    """Rank that is left, as a mean over all updates."""
    alpha: float = Field(32, gt=0)
    """The update is scaled by alpha / r."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the input of the update."""
    begin_at: float = Field(0.1, ge=0, lt=1)
    """Share of the steps after which the first ranks are taken away."""
    end_at: float = Field(0.7, gt=0, le=1)
    """Share of the steps after which the last ones are."""
    allocate_every: int = Field(1, ge=1)
    """Steps between two choices of what is taken away."""
    beta1: float = Field(0.85, gt=0, lt=1)
    """Decay of the running mean of importance."""
    beta2: float = Field(0.85, gt=0, lt=1)
    """Decay of the running mean of its spread."""
    orthogonality: float = Field(0.5, ge=0)
    """Weight of the penalty of directions that are not orthogonal."""

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.target_r >= self.r:
            raise ValueError(
                f"target_r ({self.target_r}) is what is left of r ({self.r}), and must be less"
            )
        if self.begin_at >= self.end_at:
            raise ValueError(
                f"begin_at ({self.begin_at:g}) must be before end_at ({self.end_at:g})"
            )
        return self

    def peft_config(self, model: PreTrainedModel) -> PeftConfig:
        """The settings in PEFT's own terms: of LoRA, which each update is."""
        from peft import LoraConfig

        return LoraConfig(
            r=self.r,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            **self.shared_settings(model),
        )

    def initialize(self, adapted: PeftModel) -> None:
        """Draw directions, and leave their values at zero."""
        import torch

        from qlora_cli.adapters.layers.lora_init import ADAPTER, ScaledFactor

        for layer in linear_updates(adapted, "adapter.type (adalora)").values():
            a, b = layer.lora_A[ADAPTER].weight.detach(), layer.lora_B[ADAPTER].weight
            torch.nn.init.normal_(a, std=_DEVIATION)
            torch.nn.init.normal_(b, std=_DEVIATION)
            layer.lora_A[ADAPTER] = ScaledFactor(a, num_out=b.shape[0])

    def step_hooks(self, model: nn.Module, max_steps: int) -> StepHooks:
        """Take ranks away."""
        from qlora_cli.adapters.layers.lora_init import ADAPTER, low_rank_layers
        from qlora_cli.adapters.layers.rank_allocation import RankAllocator, RankBudget

        layers = [layer for _, layer in low_rank_layers(model)]
        begin = round(self.begin_at * max_steps)
        budget = RankBudget(
            first=self.r * len(layers),
            last=self.target_r * len(layers),
            begin=begin,
            end=max(begin + 1, round(self.end_at * max_steps)),
            every=self.allocate_every,
        )
        return RankAllocator(
            [(layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]) for layer in layers],
            budget,
            beta1=self.beta1,
            beta2=self.beta2,
            orthogonality=self.orthogonality,
        )

    def save(self, model: PeftModel, folder: Path) -> None:
        """Write the adapter as ordinary LoRA, each update with the rank that it has left."""
        from qlora_cli.adapters.layers.lora_init import ADAPTER, low_rank_layers, plain_lora_state

        state, config = plain_lora_state(model), model.peft_config[ADAPTER]
        config.rank_pattern, config.alpha_pattern = {}, {}
        for name, layer in low_rank_layers(model):
            kept = layer.lora_A[ADAPTER].values[:, 0] != 0
            rank = int(kept.sum())
            if rank == self.r:
                continue
            if rank == 0:
                kept[0], rank = True, 1  # of zeros: LoRA has no rank of none
            place = f"base_model.model.{name}.lora"
            state[f"{place}_A.{ADAPTER}.weight"] = state[f"{place}_A.{ADAPTER}.weight"][kept]
            state[f"{place}_B.{ADAPTER}.weight"] = state[f"{place}_B.{ADAPTER}.weight"][:, kept]
            config.rank_pattern[name] = rank
            config.alpha_pattern[name] = self.alpha * rank / self.r
        save_adapter(model, folder, state_dict=state)
