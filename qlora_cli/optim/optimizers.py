"""All optimizers. To add one: a class here or in `families.py`, and its name in the union."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, get_args

from pydantic import Field, model_validator

from qlora_cli.errors import RecipeError
from qlora_cli.optim.base import Groups, Optimizer
from qlora_cli.optim.families import AdamW, AdEMAMix, Beta1, Beta2, Eps, Lion
from qlora_cli.optim.groups import NamedParameters

if TYPE_CHECKING:
    import torch

log = logging.getLogger("qlora")


class Adafactor(Optimizer):
    """Keeps only the row and column means of squared gradients (https://arxiv.org/abs/1804.04235)."""

    type: Literal["adafactor"] = "adafactor"
    num_means = 0  # a row and a column for each matrix
    learning_rate: float = Field(1e-2, gt=0)
    """Peak learning rate; the schedule scales it. It is relative to the weights: a step changes a
    tensor by about this share of its root mean square (taken as at least 0.001)."""
    beta2_decay: float = Field(0.8, ge=0)
    """The decay of the running means is 1 - step ** -beta2_decay."""
    clip_threshold: float = Field(1.0, ge=1)
    """Maximum root mean square of an update, before the learning rate is applied."""

    def _make(self, groups: Groups) -> torch.optim.Optimizer:
        from torch.optim import Adafactor as TorchAdafactor

        return TorchAdafactor(
            groups,
            lr=self.learning_rate,
            beta2_decay=-self.beta2_decay,
            d=self.clip_threshold,
            # foreach would hold an update of all weights at once, which Adafactor is there to save.
            foreach=False,
        )


class SGD(Optimizer):
    """Stochastic gradient descent with momentum."""

    type: Literal["sgd"] = "sgd"
    num_means = 1
    learning_rate: float = Field(1e-2, gt=0)
    """Peak learning rate; the schedule scales it."""
    weight_decay: float = Field(0.0, ge=0)
    """L2 penalty of trained matrices (never of biases and norms), added to their gradient."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Decay of the running sum of gradients; 0 turns momentum off."""
    nesterov: bool = False
    """Use Nesterov momentum."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum above 0")
        return self

    def _make(self, groups: Groups) -> torch.optim.Optimizer:
        from torch.optim import SGD as TorchSGD

        return TorchSGD(
            groups,
            lr=self.learning_rate,
            momentum=self.momentum,
            nesterov=self.nesterov,
            foreach=_updates_together(groups),
        )


def _updates_together(groups: Groups) -> bool:
    """Tell if SGD updates all weights in a few launches: on CUDA, and without temporary memory.

    Weight decay would take a copy of all gradients. torch's fused SGD would take none, but begins
    with arbitrary momentum if the first step of a run in float16 overflows.
    """
    weights = [weight for group in groups for weight in group["params"]]
    has_decay = any(group.get("weight_decay", 0) for group in groups)
    return not has_decay and all(weight.is_cuda for weight in weights)


class ScheduleFreeAdamW(Optimizer):
    """AdamW with averaged weights instead of a schedule (https://arxiv.org/abs/2405.15682). The
    average is evaluated and saved."""

    type: Literal["schedule_free_adamw"] = "schedule_free_adamw"
    is_schedule_free = True
    num_means = 2
    learning_rate: float = Field(1e-3, gt=0)
    """Learning rate, constant after warm-up. Choose it larger than for AdamW."""
    beta1: float = Field(0.9, gt=0, lt=1)
    """How close to the average the gradient is computed (1 is at the average)."""
    beta2: Beta2 = 0.999
    eps: Eps = 1e-8

    def _make(self, groups: Groups) -> torch.optim.Optimizer:
        from schedulefree import AdamWScheduleFree

        optimizer = AdamWScheduleFree(
            groups,
            lr=self.learning_rate,
            betas=(self.beta1, self.beta2),
            eps=self.eps,
            foreach=False,  # as for Adafactor
        )
        optimizer.train()
        plain: torch.optim.Optimizer = optimizer
        return plain

    def evaluation_weights(self, optimizer: torch.optim.Optimizer) -> AbstractContextManager[None]:
        """Return a context in which the weights are the average, not the point of the gradient."""
        return _averaged(optimizer)


@contextmanager
def _averaged(optimizer: Any) -> Iterator[None]:
    """Replace the weights by their average, and restore them bit for bit at the end.

    The library's own way back rounds: then evaluating a run would change its training.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    kept = [p.detach().clone() for p in parameters]
    optimizer.eval()
    try:
        yield
    finally:
        optimizer.train()
        for parameter, values in zip(parameters, kept, strict=True):
            parameter.detach().copy_(values)


class Muon(Optimizer):
    """Orthogonal updates for the matrices in the layers (https://arxiv.org/abs/2502.16982), AdamW
    for embeddings, head, norms and biases."""

    type: Literal["muon"] = "muon"
    num_means = 1  # for matrices; 2 for what AdamW trains
    beta1: Beta1 = 0.9
    beta2: Beta2 = 0.999
    eps: Eps = 1e-8
    momentum: float = Field(0.95, ge=0, lt=1)
    """Decay of the running sum of gradients, with Nesterov momentum."""

    def build(self, parameters: NamedParameters, device: torch.device) -> torch.optim.Optimizer:
        """Build the optimizer of those `parameters` that require a gradient.

        Raises:
            RecipeError: a group has no parameter, or no trained parameter is a matrix in a layer.
        """
        from torch.optim import AdamW as TorchAdamW
        from torch.optim import Muon as TorchMuon

        from qlora_cli.optim.joined import combine_optimizers

        named = [(name, p) for name, p in parameters if p.requires_grad]
        # Names in layers have a number; embeddings and head are matrices too, but have none.
        hidden = {id(p) for name, p in named if p.ndim == 2 and re.search(r"\.\d+\.", name)}
        if not hidden:
            raise RecipeError(
                "optimizer.type: muon trains matrices in the layers of the model, and none of the "
                f"{len(named)} trained tensors is one",
                hint="use optimizer.type adamw",
            )
        groups = self._grouped(named)
        log.info("muon: %d matrices; adamw: %d others", len(hidden), len(named) - len(hidden))
        # Updates are scaled to the size of AdamW's, so that both use one learning rate.
        muon = TorchMuon(
            _select(groups, hidden),
            lr=self.learning_rate,
            momentum=self.momentum,
            adjust_lr_fn="match_rms_adamw",
        )
        others = _select(groups, {id(p) for _, p in named} - hidden)
        if not others:
            return muon
        adamw = TorchAdamW(
            others,
            lr=self.learning_rate,
            betas=(self.beta1, self.beta2),
            eps=self.eps,
            fused=True,
        )
        return combine_optimizers(muon, adamw)


def _select(groups: Groups, wanted: set[int]) -> Groups:
    """Return the groups with only the parameters of these ids, without empty groups."""
    kept = [{**g, "params": [p for p in g["params"] if id(p) in wanted]} for g in groups]
    return [group for group in kept if group["params"]]


OptimizerConfig = Annotated[
    AdamW | Lion | AdEMAMix | Adafactor | SGD | ScheduleFreeAdamW | Muon,
    Field(discriminator="type"),
]


def lighter_twin(optimizer: OptimizerConfig, *, pages: bool) -> str | None:
    """Return the type of an optimizer whose states take the least GPU memory.

    It has 8-bit states, and is paged if possible; None if there is none, or `optimizer` is it.

    Args:
        pages: states can move to the host.
    """
    name = optimizer.type.removeprefix("paged_").removesuffix("_32bit").removesuffix("_8bit")
    lightest = f"{'paged_' * (pages or optimizer.is_paged)}{name}_8bit"
    types = get_args(type(optimizer).model_fields["type"].annotation)
    return lightest if lightest in types and lightest != optimizer.type else None
