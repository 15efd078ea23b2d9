"""AdaLoRA: LoRA with ranks allocated by importance."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from qlora_cli.adapters.base import AdapterMethod
from qlora_cli.adapters.peft_base import save_adapter
from qlora_cli.adapters.targets import (
    ExcludeModules,
    LayersToTransform,
    ModulesToSave,
    TargetModules,
    check_layers,
    check_targets,
    check_tied_targets,
    target_settings,
)

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch import nn
    from transformers import PreTrainedModel

    from qlora_cli.types import StepHooks

_DEVIATION = 0.02
"""Standard deviation of the initial directions, as in PEFT and in the paper's own code."""


class AdaLoRA(AdapterMethod):
    """Low-rank adaptation that starts with more ranks than it keeps, and removes the least
    important ones over all updates (AdaLoRA, Zhang et al. 2023,
    https://arxiv.org/abs/2303.10512)."""

    no_averaging: ClassVar[str] = "removed ranks would come back with the average"
    checks = (check_targets, check_layers, check_tied_targets)
    type: Literal["adalora"] = "adalora"
    target_modules: TargetModules = "all-linear"
    modules_to_save: ModulesToSave = Field([])
    layers_to_transform: LayersToTransform = None
    exclude_modules: ExcludeModules = None
    r: int = Field(12, ge=1)
    """Initial rank of each update."""
    target_r: int = Field(8, ge=1)
    """Final rank, as a mean over all updates."""
    alpha: float = Field(32, gt=0)
    """The update is scaled by alpha / r."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the input of the update."""
    begin_at: float = Field(0.1, ge=0, lt=1)
    """Share of the steps after which the first ranks are removed."""
    end_at: float = Field(0.7, gt=0, le=1)
    """Share of the steps after which no more ranks are removed."""
    allocate_every: int = Field(1, ge=1)
    """Steps between two allocations of ranks."""
    beta1: float = Field(0.85, gt=0, lt=1)
    """Decay of the running mean of importance."""
    beta2: float = Field(0.85, gt=0, lt=1)
    """Decay of the running mean of its deviation."""
    orthogonality: float = Field(0.5, ge=0)
    """Weight of the penalty on directions that are not orthogonal."""

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.target_r >= self.r:
            raise ValueError(
                f"target_r ({self.target_r}) must be less than r ({self.r}), the initial rank"
            )
        if self.begin_at >= self.end_at:
            raise ValueError(
                f"begin_at ({self.begin_at:g}) must be before end_at ({self.end_at:g})"
            )
        return self

    def peft_config(self, model: PreTrainedModel) -> PeftConfig:
        """Return PEFT's config of LoRA, which each update is an instance of."""
        from peft import LoraConfig

        return LoraConfig(
            r=self.r,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            **target_settings(self, model),
        )

    def initialize(self, adapted: PeftModel) -> None:
        """Draw the directions, and set their values to zero."""
        import torch

        from qlora_cli.adapters.layers.lora_init import ADAPTER, ScaledFactor, linear_updates

        for layer in linear_updates(adapted, "adapter.type (adalora)").values():
            a, b = layer.lora_A[ADAPTER].weight.detach(), layer.lora_B[ADAPTER].weight
            torch.nn.init.normal_(a, std=_DEVIATION)
            torch.nn.init.normal_(b, std=_DEVIATION)
            layer.lora_A[ADAPTER] = ScaledFactor(a, num_out=b.shape[0])

    def step_hooks(self, model: nn.Module, max_steps: int) -> StepHooks:
        """Return the hooks that remove ranks."""
        from qlora_cli.adapters.layers.lora_init import ADAPTER, low_rank_layers
        from qlora_cli.adapters.layers.rank_allocation import RankAllocator, RankBudget

        layers = [layer for _, layer in low_rank_layers(model)]
        first_step = round(self.begin_at * max_steps)
        budget = RankBudget(
            initial=self.r * len(layers),
            final=self.target_r * len(layers),
            first_step=first_step,
            last_step=max(first_step + 1, round(self.end_at * max_steps)),
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
        """Write the adapter as ordinary LoRA, each update with its remaining rank."""
        from qlora_cli.adapters.layers.lora_init import ADAPTER, low_rank_layers, plain_lora_state

        state, config = plain_lora_state(model), model.peft_config[ADAPTER]
        config.rank_pattern, config.alpha_pattern = {}, {}
        for name, layer in low_rank_layers(model):
            kept = layer.lora_A[ADAPTER].values[:, 0] != 0
            rank = int(kept.sum())
            if rank == self.r:
                continue
            if rank == 0:
                kept[0], rank = True, 1  # keep one rank of zeros: LoRA does not allow rank 0
            prefix = f"base_model.model.{name}.lora"
            state[f"{prefix}_A.{ADAPTER}.weight"] = state[f"{prefix}_A.{ADAPTER}.weight"][kept]
            state[f"{prefix}_B.{ADAPTER}.weight"] = state[f"{prefix}_B.{ADAPTER}.weight"][:, kept]
            config.rank_pattern[name] = rank
            config.alpha_pattern[name] = self.alpha * rank / self.r
        save_adapter(model, folder, state_dict=state)
