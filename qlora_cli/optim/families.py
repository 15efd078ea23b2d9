"""AdamW, Lion and AdEMAMix, each with 32-bit or 8-bit states, paged or not.

Each variant is a class of its own, because the recipe's documentation and type checkers read them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

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


def _from_bitsandbytes(name: str, groups: Groups, **options: Any) -> torch.optim.Optimizer:
    import bitsandbytes.optim

    optimizer: torch.optim.Optimizer = getattr(bitsandbytes.optim, name)(groups, **options)
    return optimizer


class AdamWFamily(Optimizer):
    """The settings of AdamW, built from bitsandbytes."""

    in_bitsandbytes: ClassVar[str]
    """The name of the class in bitsandbytes."""
    state_bytes = 8  # two running means in 32 bit
    beta1: Beta1 = 0.9
    beta2: Beta2 = 0.999
    eps: Eps = 1e-8

    def _options(self) -> dict[str, Any]:
        """Return the settings by their names in torch and bitsandbytes."""
        return {"lr": self.learning_rate, "betas": (self.beta1, self.beta2), "eps": self.eps}

    def _make(self, groups: Groups) -> torch.optim.Optimizer:
        return _from_bitsandbytes(self.in_bitsandbytes, groups, **self._options())


class AdamW(AdamWFamily):
    """AdamW with 32-bit states (Loshchilov & Hutter 2019, https://arxiv.org/abs/1711.05101)."""

    type: Literal["adamw"] = "adamw"

    def _make(self, groups: Groups) -> torch.optim.Optimizer:
        from torch.optim import AdamW as TorchAdamW

        # Fused, because foreach needs temporary memory of three times the adapter's size.
        return TorchAdamW(groups, fused=True, **self._options())


_IN_8_BIT = 1
"""Bytes in addition to one for each running mean: scales, quantization maps, and small tensors that
stay in 32 bit."""


class AdamW8bit(AdamWFamily):
    """AdamW with block-wise 8-bit states (https://arxiv.org/abs/2110.02861)."""

    type: Literal["adamw_8bit"] = "adamw_8bit"
    in_bitsandbytes = "AdamW8bit"
    state_bytes = 2 + _IN_8_BIT
    in_32_bit = AdamW


class PagedAdamW32bit(AdamWFamily):
    """AdamW whose 32-bit states may move to the host when the GPU is full (QLoRA, section 3)."""

    type: Literal["paged_adamw_32bit"] = "paged_adamw_32bit"
    in_bitsandbytes = "PagedAdamW32bit"
    unpaged = AdamW


class PagedAdamW8bit(AdamWFamily):
    """AdamW whose 8-bit states may move to the host when the GPU is full."""

    type: Literal["paged_adamw_8bit"] = "paged_adamw_8bit"
    in_bitsandbytes = "PagedAdamW8bit"
    state_bytes = AdamW8bit.state_bytes
    unpaged = AdamW8bit
    in_32_bit = PagedAdamW32bit


class LionFamily(Optimizer):
    """The settings of Lion, built from bitsandbytes."""

    in_bitsandbytes: ClassVar[str]
    """The name of the class in bitsandbytes."""
    state_bytes = 4  # one running mean in 32 bit
    learning_rate: float = Field(5e-5, gt=0)
    """Peak learning rate; the schedule scales it. Each step moves every weight by the full rate, so
    choose it three to ten times smaller than for AdamW."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """Weight of the running mean in the update, whose sign is taken."""
    beta2: float = Field(0.99, ge=0, lt=1)
    """Decay of the running mean of the gradient."""

    def _make(self, groups: Groups) -> torch.optim.Optimizer:
        betas = (self.beta1, self.beta2)
        return _from_bitsandbytes(self.in_bitsandbytes, groups, lr=self.learning_rate, betas=betas)


class Lion(LionFamily):
    """Moves each weight by the sign of a running mean (Chen et al. 2023, https://arxiv.org/abs/2302.06675)."""

    type: Literal["lion"] = "lion"
    in_bitsandbytes = "Lion"


class Lion8bit(LionFamily):
    """Lion with a block-wise 8-bit state."""

    type: Literal["lion_8bit"] = "lion_8bit"
    in_bitsandbytes = "Lion8bit"
    state_bytes = 1 + _IN_8_BIT
    in_32_bit = Lion


class PagedLion32bit(LionFamily):
    """Lion whose 32-bit state may move to the host when the GPU is full."""

    type: Literal["paged_lion_32bit"] = "paged_lion_32bit"
    in_bitsandbytes = "PagedLion"
    unpaged = Lion


class PagedLion8bit(LionFamily):
    """Lion whose 8-bit state may move to the host when the GPU is full."""

    type: Literal["paged_lion_8bit"] = "paged_lion_8bit"
    in_bitsandbytes = "PagedLion8bit"
    state_bytes = Lion8bit.state_bytes
    unpaged = Lion8bit
    in_32_bit = PagedLion32bit


class AdEMAMixFamily(Optimizer):
    """The settings of AdEMAMix, built from bitsandbytes."""

    in_bitsandbytes: ClassVar[str]
    """The name of the class in bitsandbytes."""
    state_bytes = 12  # three running means in 32 bit
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
            self.in_bitsandbytes,
            groups,
            lr=self.learning_rate,
            betas=(self.beta1, self.beta2, self.beta3),
            eps=self.eps,
            alpha=self.alpha,
            t_alpha=self.slow_warmup_steps,
            t_beta3=self.slow_warmup_steps,
        )


class AdEMAMix(AdEMAMixFamily):
    """AdamW with a second, slow running mean of the gradient (https://arxiv.org/abs/2409.03137)."""

    type: Literal["ademamix"] = "ademamix"
    # Not AdEMAMix32bit: in bitsandbytes 0.50 its states have the wrong shape.
    in_bitsandbytes = "AdEMAMix"


class AdEMAMix8bit(AdEMAMixFamily):
    """AdEMAMix with block-wise 8-bit states."""

    type: Literal["ademamix_8bit"] = "ademamix_8bit"
    in_bitsandbytes = "AdEMAMix8bit"
    state_bytes = 3 + _IN_8_BIT
    in_32_bit = AdEMAMix


class PagedAdEMAMix32bit(AdEMAMixFamily):
    """AdEMAMix whose 32-bit states may move to the host when the GPU is full."""

    type: Literal["paged_ademamix_32bit"] = "paged_ademamix_32bit"
    in_bitsandbytes = "PagedAdEMAMix"
    unpaged = AdEMAMix


class PagedAdEMAMix8bit(AdEMAMixFamily):
    """AdEMAMix whose 8-bit states may move to the host when the GPU is full."""

    type: Literal["paged_ademamix_8bit"] = "paged_ademamix_8bit"
    in_bitsandbytes = "PagedAdEMAMix8bit"
    state_bytes = AdEMAMix8bit.state_bytes
    unpaged = AdEMAMix8bit
    in_32_bit = PagedAdEMAMix32bit
