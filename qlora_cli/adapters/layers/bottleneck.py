"""The adapter of Houlsby et al. (2019, https://arxiv.org/abs/1902.00751): a small network with a
narrow middle takes a layer's output, and its result is added to that output.

It is registered with PEFT, which saves, loads and disables it and puts it on quantized layers like
its own methods.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from peft.config import PeftConfig
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _get_in_out_features
from torch import Tensor, nn
from torch.nn import functional as F

from qlora_cli.common.formatting import value_text

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
}
_DEVIATION = 1e-2
"""Standard deviation of the initial weights of the down projection (section 2.1)."""
_PREFIX = "bottleneck_"


class _Kind(StrEnum):
    """An addition to `peft.PeftType`, which cannot be extended."""

    BOTTLENECK = "BOTTLENECK"


@dataclass
class BottleneckConfig(PeftConfig):  # type: ignore[misc]  # PEFT is not typed
    """The settings in adapter_config.json."""

    size: int = 64
    """Width of the middle."""
    activation: str = "gelu"
    target_modules: list[str] | str | None = None
    """Modules whose output goes through the adapter."""
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | None = None
    init_weights: bool = field(default=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = _Kind.BOTTLENECK
        if self.activation not in _ACTIVATIONS:
            known = ", ".join(_ACTIVATIONS)
            raise ValueError(f"activation ({value_text(self.activation)}) must be one of {known}")


class BottleneckLayer(nn.Module, BaseTunerLayer):  # type: ignore[misc]  # as above
    """A layer with output y, followed by the adapter: y + up(activation(down(y)))."""

    adapter_layer_names = ("bottleneck_down", "bottleneck_up")
    # PEFT's attributes; without these lines mypy would take them for tensors or modules.
    get_base_layer: Any
    set_adapter: Any
    active_adapters: Any
    _move_adapter_to_device_of_base_layer: Any
    _cast_input_dtype: Any

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: BottleneckConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.bottleneck_down = nn.ModuleDict()
        self.bottleneck_up = nn.ModuleDict()
        self.activations: dict[str, str] = {}
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: BottleneckConfig) -> None:
        """Add an adapter. Its up projection is initially zero, so that the output is unchanged."""
        _, width = _get_in_out_features(self.get_base_layer())
        down, up = nn.Linear(width, config.size), nn.Linear(config.size, width)
        nn.init.normal_(down.weight, std=_DEVIATION)
        for zero in (down.bias, up.weight, up.bias):
            nn.init.zeros_(zero)
        self.bottleneck_down[adapter_name], self.bottleneck_up[adapter_name] = down, up
        self.activations[adapter_name] = config.activation
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        """(..., in) -> (..., out)."""
        y: Tensor = self.base_layer(x, *args, **options)
        if self.disable_adapters:
            return y
        for name in self.active_adapters:
            if name in self.bottleneck_down:
                down, up = self.bottleneck_down[name], self.bottleneck_up[name]
                narrow = down(self._cast_input_dtype(y, down.weight.dtype))
                y = y + up(_ACTIVATIONS[self.activations[name]](narrow)).to(y.dtype)
        return y

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raise NotImplementedError: weights of the base cannot express the non-linearity."""
        raise NotImplementedError("weights of the base cannot express the adapter's non-linearity")


class BottleneckModel(BaseTuner):  # type: ignore[misc]  # as above
    """PEFT's tuner: puts adapters after the modules that a config names."""

    prefix = _PREFIX
    tuner_layer_cls = BottleneckLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012  PEFT's attribute

    def _create_and_replace(
        self,
        peft_config: BottleneckConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, BottleneckLayer):
            target.update_layer(adapter_name, peft_config)
            return
        layer = BottleneckLayer(target, adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)


def register() -> None:
    """Add the method to the tables in which PEFT keeps its own.

    `peft.utils.register_peft_method` fills the same tables, but accepts only members of
    `peft.PeftType`.
    """
    PEFT_TYPE_TO_CONFIG_MAPPING[_Kind.BOTTLENECK] = BottleneckConfig
    PEFT_TYPE_TO_TUNER_MAPPING[_Kind.BOTTLENECK] = BottleneckModel
    PEFT_TYPE_TO_PREFIX_MAPPING[_Kind.BOTTLENECK] = _PREFIX
