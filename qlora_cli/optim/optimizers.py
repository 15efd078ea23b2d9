"""Optimizers, from torch and bitsandbytes."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from qlora_cli.part import Part

if TYPE_CHECKING:
    import torch
    from torch.nn import Parameter

log = logging.getLogger("qlora")


def decay_groups(
    parameters: Iterable[Parameter], *, learning_rate: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Weight decay for matrices alone: on biases, norms and DoRA magnitudes it only does harm.

    `initial_lr` is what the schedule scales; `lr` is what the step then uses.
    """
    trainable = [p for p in parameters if p.requires_grad]
    matrices = [p for p in trainable if p.ndim >= 2]
    rest = [p for p in trainable if p.ndim < 2]
    return [
        {"params": group, "weight_decay": decay, "initial_lr": learning_rate}
        for group, decay in ((matrices, weight_decay), (rest, 0.0))
        if group
    ]


class _AdamW(Part):
    is_paged: ClassVar[bool] = False
    """On CUDA, states of 100,000 values or more are in memory that the host and the card share."""
    state_bytes: ClassVar[int] = 8
    """Of a checkpoint, for each trained weight: two running means in 32 bit."""
    learning_rate: float = Field(2e-4, gt=0)
    """Highest learning rate; the schedule scales it."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay of trained matrices (never of biases and norms)."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """Decay of the running mean of the gradient."""
    beta2: float = Field(0.999, ge=0, lt=1)
    """Decay of the running mean of the squared gradient."""
    eps: float = Field(1e-8, gt=0)
    """Added to the denominator."""

    def _groups(self, parameters: Iterable[Parameter]) -> list[dict[str, Any]]:
        return decay_groups(
            parameters, learning_rate=self.learning_rate, weight_decay=self.weight_decay
        )

    def _options(self) -> dict[str, Any]:
        return {"lr": self.learning_rate, "betas": (self.beta1, self.beta2), "eps": self.eps}

    def _torch(self, parameters: Iterable[Parameter]) -> torch.optim.Optimizer:
        from torch.optim import AdamW as TorchAdamW

        # Fused: the foreach form needs temporaries of three times the adapter's bytes.
        return TorchAdamW(self._groups(parameters), fused=True, **self._options())

    def _bitsandbytes(self, name: str, parameters: Iterable[Parameter]) -> torch.optim.Optimizer:
        import bitsandbytes.optim

        optimizer_class = getattr(bitsandbytes.optim, name)
        optimizer: torch.optim.Optimizer = optimizer_class(
            self._groups(parameters), **self._options()
        )
        return optimizer

    def _say_unpaged(self, asked: str, used: str) -> None:
        log.warning("optimizer.type: %s pages into CUDA memory; no CUDA here, so %s", asked, used)


class AdamW(_AdamW):
    """AdamW with 32-bit states (Loshchilov & Hutter 2019, https://arxiv.org/abs/1711.05101)."""

    type: Literal["adamw"] = "adamw"

    def build(self, parameters: Iterable[Parameter], device: torch.device) -> torch.optim.Optimizer:
        """An optimizer over those of `parameters` that require a gradient."""
        return self._torch(parameters)


_IN_8_BIT = 3
"""Two running means of one byte each, and a third for their scales, their maps and the small
tensors that stay in 32 bit."""


class AdamW8bit(_AdamW):
    """AdamW with block-wise 8-bit states (https://arxiv.org/abs/2110.02861)."""

    type: Literal["adamw_8bit"] = "adamw_8bit"
    state_bytes: ClassVar[int] = _IN_8_BIT

    def build(self, parameters: Iterable[Parameter], device: torch.device) -> torch.optim.Optimizer:
        """An optimizer over those of `parameters` that require a gradient."""
        return self._bitsandbytes("AdamW8bit", parameters)


class PagedAdamW32bit(_AdamW):
    """AdamW whose 32-bit states may move to the host when the GPU is full (QLoRA, section 3)."""

    type: Literal["paged_adamw_32bit"] = "paged_adamw_32bit"
    is_paged: ClassVar[bool] = True

    def build(self, parameters: Iterable[Parameter], device: torch.device) -> torch.optim.Optimizer:
        """An optimizer over those of `parameters` that require a gradient. Unpaged off CUDA."""
        if device.type != "cuda":
            self._say_unpaged(self.type, "adamw")
            return self._torch(parameters)
        return self._bitsandbytes("PagedAdamW32bit", parameters)


class PagedAdamW8bit(_AdamW):
    """AdamW whose 8-bit states may be moved to the host when the GPU is full."""

    type: Literal["paged_adamw_8bit"] = "paged_adamw_8bit"
    state_bytes: ClassVar[int] = _IN_8_BIT

    def build(self, parameters: Iterable[Parameter], device: torch.device) -> torch.optim.Optimizer:
        """An optimizer over those of `parameters` that require a gradient. Unpaged off CUDA."""
        if device.type != "cuda":
            self._say_unpaged(self.type, "adamw_8bit")
            return self._bitsandbytes("AdamW8bit", parameters)
        return self._bitsandbytes("PagedAdamW8bit", parameters)


OptimizerConfig = Annotated[
    AdamW | AdamW8bit | PagedAdamW32bit | PagedAdamW8bit, Field(discriminator="type")
]
