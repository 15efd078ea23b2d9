"""AdamW, Lion and AdEMAMix, each with 32-bit or 8-bit states, paged or not: see `type`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from qlora_cli.optim.base import Groups, Optimizer

if TYPE_CHECKING:
    import torch


Beta1 = Annotated[
    float, Field(ge=0, lt=1, description="Decay of the running mean of the gradient.")
]
Beta2 = Annotated[
    float, Field(ge=0, lt=1, description="Decay of the running mean of the squared gradient.")
]
Eps = Annotated[float, Field(gt=0, description="Added to the denominator.")]


def _from_bitsandbytes(config: Optimizer, groups: Groups, **options: Any) -> torch.optim.Optimizer:
    """Build the class of bitsandbytes that has the states of `config.type`."""
    import bitsandbytes.optim

    # Not AdEMAMix32bit: in bitsandbytes 0.50 its states have the wrong shape.
    name = f"{'Paged' * config.is_paged}{type(config).__name__}{'8bit' * config.has_8bit_states}"
    optimizer: torch.optim.Optimizer = getattr(bitsandbytes.optim, name)(
        groups, lr=config.learning_rate, **options
    )
    return optimizer


class AdamW(Optimizer):
    """AdamW (Loshchilov & Hutter 2019, https://arxiv.org/abs/1711.05101). With `_8bit`, block-wise
    8-bit states (https://arxiv.org/abs/2110.02861); with `paged_`, states may move to the host when
    the GPU is full (QLoRA, section 3)."""

    type: Literal["adamw", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"] = "adamw"
    num_means = 2
    beta1: Beta1 = 0.9
    beta2: Beta2 = 0.999
    eps: Eps = 1e-8

    def _make(self, groups: Groups) -> torch.optim.Optimizer:
        betas = (self.beta1, self.beta2)
        if self.type != "adamw":
            return _from_bitsandbytes(self, groups, betas=betas, eps=self.eps)
        from torch.optim import AdamW as TorchAdamW

        # Fused, because foreach needs temporary memory of three times the adapter's size.
        return TorchAdamW(groups, lr=self.learning_rate, betas=betas, eps=self.eps, fused=True)


class Lion(Optimizer):
    """Moves each weight by the sign of a running mean (Chen et al. 2023,
    https://arxiv.org/abs/2302.06675); `_8bit` and `paged_` as for AdamW."""

    type: Literal["lion", "lion_8bit", "paged_lion_32bit", "paged_lion_8bit"] = "lion"
    num_means = 1
    learning_rate: float = Field(5e-5, gt=0)
    """Peak learning rate; the schedule scales it. Each step moves every weight by the full rate, so
    choose it three to ten times smaller than for AdamW."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """Weight of the running mean in the update, whose sign is taken."""
    beta2: float = Field(0.99, ge=0, lt=1)
    """Decay of the running mean of the gradient."""

    def _make(self, groups: Groups) -> torch.optim.Optimizer:
        return _from_bitsandbytes(self, groups, betas=(self.beta1, self.beta2))


class AdEMAMix(Optimizer):
    """AdamW with a second, slow running mean of the gradient (https://arxiv.org/abs/2409.03137);
    `_8bit` and `paged_` as for AdamW."""

    type: Literal["ademamix", "ademamix_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit"] = (
        "ademamix"
    )
    num_means = 3
    beta1: Beta1 = 0.9
    beta2: Beta2 = 0.999
    eps: Eps = 1e-8
    beta3: float = Field(0.9999, ge=0, lt=1)
    """Decay of the slow running mean of the gradient."""
    alpha: float = Field(5.0, ge=0)
    """Weight of the slow running mean, relative to the fast one."""
    slow_warmup_steps: int | None = Field(None, ge=1)
    """Steps over which `alpha` and `beta3` grow to their values; the paper uses all steps of the
    run. Null starts with their full values."""

    def _make(self, groups: Groups) -> torch.optim.Optimizer:
        return _from_bitsandbytes(
            self,
            groups,
            betas=(self.beta1, self.beta2, self.beta3),
            eps=self.eps,
            alpha=self.alpha,
            t_alpha=self.slow_warmup_steps,
            t_beta3=self.slow_warmup_steps,
        )
