"""The base of all optimizers: their shared settings, and parameter groups."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from qlora_cli.common.config import Config
from qlora_cli.optim.groups import NamedParameters, ParameterGroup, group_parameters

if TYPE_CHECKING:
    import torch

log = logging.getLogger("qlora")

Groups = list[dict[str, Any]]
"""Parameter groups of torch's optimizers."""


class Optimizer(Config):
    """The base of all optimizers."""

    num_means: ClassVar[int]
    """Running means or sums that it keeps of each trained weight."""
    is_schedule_free: ClassVar[bool] = False
    """The optimizer averages weights over the steps instead of decaying the learning rate."""
    type: str
    learning_rate: float = Field(2e-4, gt=0)
    """Peak learning rate; the schedule scales it."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay of trained matrices (never of biases and norms)."""
    groups: list[ParameterGroup] = Field([])
    """Parameters with their own learning rate or weight decay."""
    lora_plus_ratio: float | None = Field(None, gt=0)
    """LoRA+ (https://arxiv.org/abs/2402.12354): learning rate of the factors B, as a multiple of
    `learning_rate`, which the factors A get. Null gives both the same."""

    @property
    def is_paged(self) -> bool:
        """Tell whether states may move to the host when CUDA is used.

        With CUDA, states of 100,000 values or more are then in memory that host and GPU share.
        """
        return self.type.startswith("paged_")

    @property
    def has_8bit_states(self) -> bool:
        """Tell whether the states of large tensors are quantized to 8 bits."""
        return self.type.endswith("_8bit")

    @property
    def state_bytes(self) -> int:
        """Bytes in a checkpoint for each trained weight."""
        # In 8 bits, one more: scales, quantization maps, and small tensors that stay in 32 bit.
        return self.num_means + 1 if self.has_8bit_states else 4 * self.num_means

    def build(self, parameters: NamedParameters, device: torch.device) -> torch.optim.Optimizer:
        """Build the optimizer of those `parameters` that require a gradient.

        Raises:
            RecipeError: a group has no parameter, or the optimizer cannot train any of them.
        """
        used = self.type_on(device)
        if used == self.type:
            return self._make(self._grouped(parameters))
        log.warning("optimizer.type: %s needs CUDA for paging; using %s instead", self.type, used)
        return self.model_copy(update={"type": used}).build(parameters, device)

    def type_on(self, device: torch.device) -> str:
        """Return the type that runs on a device: without CUDA, a paged optimizer is not paged."""
        if not self.is_paged or device.type == "cuda":
            return self.type
        return self.type.removeprefix("paged_").removesuffix("_32bit")

    def evaluation_weights(self, optimizer: torch.optim.Optimizer) -> AbstractContextManager[None]:
        """Return a context in which the trained weights are those to evaluate and to save."""
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
        """Build the library's optimizer of these groups."""
        raise NotImplementedError


def load_states(optimizer: Any, saved: dict[str, Any]) -> None:
    """Load the saved state of an optimizer; states of a paged one stay in shared memory.

    bitsandbytes 0.50 loads all of them to the GPU, where they would no longer make room.
    """
    if not getattr(optimizer, "is_paged", False):
        optimizer.load_state_dict(saved)
        return
    # Shared memory is never freed, so what a rollback finds is used again.
    shared = {
        (parameter, name): value
        for parameter, state in optimizer.state.items()
        for name, value in state.items()
        if getattr(value, "is_paged", False)
    }
    optimizer.load_state_dict(saved)
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            # The others are scalars, block scales and quantization maps.
            if getattr(value, "ndim", 0) and value.numel() % parameter.numel() == 0:
                buffer = shared.get((parameter, name))
                if buffer is None:
                    buffer = _state_buffer(optimizer, parameter, value)
                state[name] = buffer.copy_(value)


def _state_buffer(optimizer: Any, parameter: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Return memory for a state, shared if it is large enough to be paged."""
    is_double = value.numel() == 2 * parameter.numel()  # AdEMAMix keeps two means in one tensor
    make = optimizer._get_state_double_buffer if is_double else optimizer.get_state_buffer
    buffer: torch.Tensor = make(parameter, dtype=value.dtype)
    return buffer
