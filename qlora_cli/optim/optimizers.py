"""Optimizers, from torch, bitsandbytes and schedulefree. To add one: a class, and its name in the
union."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import Field, model_validator

from qlora_cli.common.config import Config
from qlora_cli.errors import RecipeError
from qlora_cli.optim.groups import NamedParameters, ParameterGroup, group_parameters

if TYPE_CHECKING:
    import torch

log = logging.getLogger("qlora")

Groups = list[dict[str, Any]]
"""Parameters with their settings, as torch's optimizers take them."""


class _Optimizer(Config):
    state_bytes: ClassVar[int]
    """Of a checkpoint, for each trained weight."""
    unpaged: ClassVar[type[_Optimizer] | None] = None
    """What a paged one is where nothing can be paged. (On CUDA, its states of 100,000 values or
    more are in memory that the host and the card share.)"""
    in_32_bit: ClassVar[type[_Optimizer] | None] = None
    """The same algorithm with states in 32 bit, of one that has them in 8."""
    is_schedule_free: ClassVar[bool] = False
    """It averages the weights over the steps, in place of a learning rate that falls."""
    learning_rate: float = Field(2e-4, gt=0)
    """Highest learning rate; the schedule scales it."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay of trained matrices (never of biases and norms)."""
    groups: list[ParameterGroup] = Field([])
    """Parameters with a learning rate or weight decay of their own."""
    lora_plus_ratio: float | None = Field(None, gt=0)
    """LoRA+ (https://arxiv.org/abs/2402.12354): the learning rate of the factors B is so many times
    that of the factors A, which is `learning_rate`. Null gives both the same."""

    @property
    def is_paged(self) -> bool:
        """Whether states may move to the host, on CUDA."""
        return self.unpaged is not None

    def build(self, parameters: NamedParameters, device: torch.device) -> torch.optim.Optimizer:
        """An optimizer over those of `parameters` that require a gradient. Unpaged off CUDA.

        Raises:
            RecipeError: a group has no parameter, or none suits the optimizer.
        """
        if self.unpaged is None or device.type == "cuda":
            return self._make(self._grouped(parameters))
        plain = self.unpaged(**{name: value for name, value in self if name != "type"})
        log.warning(
            "optimizer.type: %s pages into CUDA memory; no CUDA here, so %s",
            *(one.model_fields["type"].default for one in (type(self), self.unpaged)),
        )
        return plain.build(parameters, device)

    def evaluation_weights(self, optimizer: torch.optim.Optimizer) -> AbstractContextManager[None]:
        """While it is entered, the trained weights are those to evaluate and to save."""
        return nullcontext()

    def _grouped(self, parameters: NamedParameters) -> Groups:
        groups = {f"optimizer.groups[{i}]": group for i, group in enumerate(self.groups)}
        if self.lora_plus_ratio is not None:
            groups["optimizer.lora_plus_ratio"] = ParameterGroup(
                match=r"\.lora_(embedding_)?B\.",
                learning_rate=self.lora_plus_ratio * self.learning_rate,
            )
        return group_parameters(
            parameters, groups, learning_rate=self.learning_rate, weight_decay=self.weight_decay
        )

    def _make(self, groups: Groups) -> torch.optim.Optimizer:
        raise NotImplementedError


def _from_bitsandbytes(name: str, groups: Groups, **options: Any) -> torch.optim.Optimizer:
    import bitsandbytes.optim

    optimizer: torch.optim.Optimizer = getattr(bitsandbytes.optim, name)(groups, **options)
    return optimizer


class _AdamW(_Optimizer):
    in_bitsandbytes: ClassVar[str]
    state_bytes = 8  # two running means in 32 bit
    beta1: float = Field(0.9, ge=0, lt=1)
    """Decay of the running mean of the gradient."""
    beta2: float = Field(0.999, ge=0, lt=1)
    """Decay of the running mean of the squared gradient."""
    eps: float = Field(1e-8, gt=0)
    """Added to the denominator."""

    def _options(self) -> dict[str, Any]:
        return {"lr": self.learning_rate, "betas": (self.beta1, self.beta2), "eps": self.eps}

    def _make(self, groups: Groups) -> torch.optim.Optimizer:
        return _from_bitsandbytes(self.in_bitsandbytes, groups, **self._options())


class AdamW(_AdamW):
    """AdamW with 32-bit states (Loshchilov & Hutter 2019, https://arxiv.org/abs/1711.05101)."""

    type: Literal["adamw"] = "adamw"

    def _make(self, groups: Groups) -> torch.optim.Optimizer:
        from torch.optim import AdamW as TorchAdamW

        # Fused: the foreach form needs temporaries of three times the adapter's bytes.
        return TorchAdamW(groups, fused=True, **self._options())


_IN_8_BIT = 1
"""Beside a byte for each running mean: their scales, their maps and the small tensors that stay in
32 bit."""


class AdamW8bit(_AdamW):
    """AdamW with block-wise 8-bit states (https://arxiv.org/abs/2110.02861)."""

    type: Literal["adamw_8bit"] = "adamw_8bit"
    in_bitsandbytes = "AdamW8bit"
    state_bytes = 2 + _IN_8_BIT
    in_32_bit = AdamW


class PagedAdamW32bit(_AdamW):
    """AdamW whose 32-bit states may move to the host when the GPU is full (QLoRA, section 3)."""

    type: Literal["paged_adamw_32bit"] = "paged_adamw_32bit"
    in_bitsandbytes = "PagedAdamW32bit"
    unpaged = AdamW


class PagedAdamW8bit(_AdamW):
    """AdamW whose 8-bit states may be moved to the host when the GPU is full."""

    type: Literal["paged_adamw_8bit"] = "paged_adamw_8bit"
    in_bitsandbytes = "PagedAdamW8bit"
    state_bytes = AdamW8bit.state_bytes
    unpaged = AdamW8bit
    in_32_bit = PagedAdamW32bit


class _Lion(_Optimizer):
    in_bitsandbytes: ClassVar[str]
    state_bytes = 4  # one running mean in 32 bit
    learning_rate: float = Field(5e-5, gt=0)
    """Highest learning rate; the schedule scales it. Each step moves every weight by all of it, so
    it is three to ten times smaller than for AdamW."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """Share of the running mean in what the sign of is taken."""
    beta2: float = Field(0.99, ge=0, lt=1)
    """Decay of the running mean of the gradient."""

    def _make(self, groups: Groups) -> torch.optim.Optimizer:
        betas = (self.beta1, self.beta2)
        return _from_bitsandbytes(self.in_bitsandbytes, groups, lr=self.learning_rate, betas=betas)


class Lion(_Lion):
    """The sign of a running mean (Chen et al. 2023, https://arxiv.org/abs/2302.06675)."""

    type: Literal["lion"] = "lion"
    in_bitsandbytes = "Lion"


class Lion8bit(_Lion):
    """Lion with a block-wise 8-bit state."""

    type: Literal["lion_8bit"] = "lion_8bit"
    in_bitsandbytes = "Lion8bit"
    state_bytes = 1 + _IN_8_BIT
    in_32_bit = Lion


class PagedLion32bit(_Lion):
    """Lion whose 32-bit state may move to the host when the GPU is full."""

    type: Literal["paged_lion_32bit"] = "paged_lion_32bit"
    in_bitsandbytes = "PagedLion"
    unpaged = Lion


class PagedLion8bit(_Lion):
    """Lion whose 8-bit state may move to the host when the GPU is full."""

    type: Literal["paged_lion_8bit"] = "paged_lion_8bit"
    in_bitsandbytes = "PagedLion8bit"
    state_bytes = Lion8bit.state_bytes
    unpaged = Lion8bit
    in_32_bit = PagedLion32bit


class _AdEMAMix(_AdamW):
    state_bytes = 12  # three running means in 32 bit
    beta3: float = Field(0.9999, ge=0, lt=1)
    """Decay of the slow running mean of the gradient."""
    alpha: float = Field(5.0, ge=0)
    """Weight of the slow running mean beside the fast one."""
    slow_warmup_steps: int | None = Field(None, ge=1)
    """Steps over which `alpha` and `beta3` grow to their values; the paper takes all steps of the
    run. Null begins with them."""

    def _options(self) -> dict[str, Any]:
        return {
            **super()._options(),
            "betas": (self.beta1, self.beta2, self.beta3),
            "alpha": self.alpha,
            "t_alpha": self.slow_warmup_steps,
            "t_beta3": self.slow_warmup_steps,
        }


class AdEMAMix(_AdEMAMix):
    """AdamW with a second, slow running mean of the gradient (https://arxiv.org/abs/2409.03137)."""

    type: Literal["ademamix"] = "ademamix"
    # Not AdEMAMix32bit: in bitsandbytes 0.50 its states have the wrong shape.
    in_bitsandbytes = "AdEMAMix"


class AdEMAMix8bit(_AdEMAMix):
    """AdEMAMix with block-wise 8-bit states."""

    type: Literal["ademamix_8bit"] = "ademamix_8bit"
    in_bitsandbytes = "AdEMAMix8bit"
    state_bytes = 3 + _IN_8_BIT
    in_32_bit = AdEMAMix


class PagedAdEMAMix32bit(_AdEMAMix):
    """AdEMAMix whose 32-bit states may move to the host when the GPU is full."""

    type: Literal["paged_ademamix_32bit"] = "paged_ademamix_32bit"
    in_bitsandbytes = "PagedAdEMAMix"
    unpaged = AdEMAMix


class PagedAdEMAMix8bit(_AdEMAMix):
    """AdEMAMix whose 8-bit states may move to the host when the GPU is full."""

    type: Literal["paged_ademamix_8bit"] = "paged_ademamix_8bit"
    in_bitsandbytes = "PagedAdEMAMix8bit"
    state_bytes = AdEMAMix8bit.state_bytes
    unpaged = AdEMAMix8bit
    in_32_bit = PagedAdEMAMix32bit


class Adafactor(_Optimizer):
    """Squared gradients by their rows and columns alone (https://arxiv.org/abs/1804.04235)."""

    type: Literal["adafactor"] = "adafactor"
    state_bytes = 0  # a row and a column for each matrix
    learning_rate: float = Field(1e-2, gt=0)
    """Highest learning rate; the schedule scales it. It counts in sizes of the weight: a step
    changes a tensor by about this share of its root mean square (of at least 0.001)."""
    beta2_decay: float = Field(0.8, ge=0)
    """The decay of the running means is 1 - step ** -beta2_decay."""
    clip_threshold: float = Field(1.0, ge=1)
    """Largest root mean square of an update, before the learning rate."""

    def _make(self, groups: Groups) -> torch.optim.Optimizer:
        from torch.optim import Adafactor as TorchAdafactor

        return TorchAdafactor(
            groups,
            lr=self.learning_rate,
            beta2_decay=-self.beta2_decay,
            d=self.clip_threshold,
            foreach=False,
        )


class SGD(_Optimizer):
    """Stochastic gradient descent with momentum."""

    type: Literal["sgd"] = "sgd"
    state_bytes = 4
    learning_rate: float = Field(1e-2, gt=0)
    """Highest learning rate; the schedule scales it."""
    weight_decay: float = Field(0.0, ge=0)
    """L2 penalty of trained matrices (never of biases and norms): added to their gradient."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Decay of the running sum of gradients; 0 keeps none."""
    nesterov: bool = False
    """Look ahead by the momentum."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov looks ahead by the momentum, which is 0; give momentum too")
        return self

    def _make(self, groups: Groups) -> torch.optim.Optimizer:
        from torch.optim import SGD as TorchSGD

        return TorchSGD(
            groups,
            lr=self.learning_rate,
            momentum=self.momentum,
            nesterov=self.nesterov,
            # Neither foreach, which needs temporaries, nor fused, which cannot be traced.
            foreach=False,
        )


class ScheduleFreeAdamW(_AdamW):
    """AdamW on the average of its steps, which needs no schedule
    (https://arxiv.org/abs/2405.15682). What is evaluated and saved is the average."""

    type: Literal["schedule_free_adamw"] = "schedule_free_adamw"
    is_schedule_free = True
    learning_rate: float = Field(1e-3, gt=0)
    """Learning rate, after warm-up the same in all steps. It is larger than for AdamW."""
    beta1: float = Field(0.9, gt=0, lt=1)
    """How near to the average the gradient is taken."""

    def _make(self, groups: Groups) -> torch.optim.Optimizer:
        from schedulefree import AdamWScheduleFree

        optimizer = AdamWScheduleFree(groups, foreach=False, **self._options())
        optimizer.train()
        made: torch.optim.Optimizer = optimizer
        return made

    def evaluation_weights(self, optimizer: torch.optim.Optimizer) -> AbstractContextManager[None]:
        """The average, in place of the point at which the gradient is taken."""
        return _averaged(optimizer)


@contextmanager
def _averaged(optimizer: Any) -> Iterator[None]:
    """Afterwards every bit is as before, which the library's way back does not give: whether a run
    is evaluated must not change what it learns."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    kept = [p.detach().clone() for p in parameters]
    optimizer.eval()
    try:
        yield
    finally:
        optimizer.train()
        for parameter, values in zip(parameters, kept, strict=True):
            parameter.detach().copy_(values)


class Muon(_AdamW):
    """Orthogonal updates of the matrices in the layers (https://arxiv.org/abs/2502.16982);
    embeddings, head, norms and biases have AdamW."""

    type: Literal["muon"] = "muon"
    state_bytes = 4  # of what AdamW has, 8
    momentum: float = Field(0.95, ge=0, lt=1)
    """Decay of the running sum of gradients (Nesterov's)."""

    def build(self, parameters: NamedParameters, device: torch.device) -> torch.optim.Optimizer:
        """An optimizer over those of `parameters` that require a gradient.

        Raises:
            RecipeError: a group has no parameter, or no trained parameter is a matrix in a layer.
        """
        from torch.optim import AdamW as TorchAdamW
        from torch.optim import Muon as TorchMuon

        from qlora_cli.optim.joined import join

        named = [(name, p) for name, p in parameters if p.requires_grad]
        # Layers are numbered; embeddings and the head, which are matrices too, are in none.
        hidden = {id(p) for name, p in named if p.ndim == 2 and re.search(r"\.\d+\.", name)}
        if not hidden:
            raise RecipeError(
                "optimizer.type: muon is for matrices in the layers of the model, and none of "
                f"{len(named)} trained tensors is one",
                hint="use optimizer.type adamw",
            )
        groups = self._grouped(named)
        log.info("muon: %d matrices; adamw: %d others", len(hidden), len(named) - len(hidden))
        # Updates are of the size of AdamW's, so both go by one learning rate.
        muon = TorchMuon(
            _those(groups, hidden),
            lr=self.learning_rate,
            momentum=self.momentum,
            adjust_lr_fn="match_rms_adamw",
        )
        others = _those(groups, {id(p) for _, p in named} - hidden)
        if not others:
            return muon
        return join(muon, TorchAdamW(others, fused=True, **self._options()))


def _those(groups: Groups, wanted: set[int]) -> Groups:
    """The groups with the parameters of these ids alone; without those that then are empty."""
    kept = [{**g, "params": [p for p in g["params"] if id(p) in wanted]} for g in groups]
    return [group for group in kept if group["params"]]


OptimizerConfig = Annotated[
    AdamW
    | AdamW8bit
    | PagedAdamW32bit
    | PagedAdamW8bit
    | Lion
    | Lion8bit
    | PagedLion32bit
    | PagedLion8bit
    | AdEMAMix
    | AdEMAMix8bit
    | PagedAdEMAMix32bit
    | PagedAdEMAMix8bit
    | Adafactor
    | SGD
    | ScheduleFreeAdamW
    | Muon,
    Field(discriminator="type"),
]


def lighter_twin(optimizer: OptimizerConfig, *, pages: bool) -> type[_Optimizer] | None:
    """The same algorithm with its states in 8 bit, and paged where that is possible; None if there
    is none whose states take less.

    Args:
        pages: whether states can move to the host.
    """
    kinds: tuple[type[_Optimizer], ...] = get_args(get_args(OptimizerConfig)[0])
    found: type[_Optimizer] = type(optimizer)
    found = next((kind for kind in kinds if kind.in_32_bit is found), found)
    if pages:
        found = next((kind for kind in kinds if kind.unpaged is found), found)
    return None if found is type(optimizer) else found
