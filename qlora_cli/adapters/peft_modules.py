"""Merge single modules of PEFT, with values put in place of tensors on the meta device."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn


def outermost_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules that PEFT put in place of others, without those inside of them."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    found: list[str] = []
    for name, module in model.named_modules():
        is_inside = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) and not is_inside:
            found.append(name)
            yield name, module


def parameter_wrappers(module: Any) -> Iterator[Any]:
    """Yield PEFT's wrappers of single parameters, each the base layer of the one before."""
    from peft.tuners.lora.layer import ParamWrapper

    while isinstance(module, ParamWrapper):
        yield module
        module = module.base_layer


def changed_weights(name: str, module: Any) -> list[str]:
    """Return the names of the base's weights that a module of PEFT, called `name`, changes."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper

    if parameters := [one.parameter_name for one in parameter_wrappers(module)]:
        return [f"{name}.{parameter}" for parameter in parameters]
    if isinstance(module, ModulesToSaveWrapper):
        return [f"{name}.{key}" for key, _ in module.modules_to_save["default"].named_parameters()]
    is_other = isinstance(module, BaseTunerLayer) and not isinstance(module, LoraLayer)
    if is_other or any(getattr(module, "lora_bias", {}).values()):
        return [f"{name}.{key}" for key, _ in module.get_base_layer().named_parameters()]
    return [f"{name}.weight"]


def merge_module(module: Any) -> Any:
    """Merge the adapter of a module into its base layer, and return that layer."""
    if hasattr(module, "unload_and_optionally_merge_module"):
        return module.unload_and_optionally_merge_module(
            merge=True, safe_merge=False, adapter_names=None
        )
    module.merge(safe_merge=False)
    return module.get_base_layer()


def is_incomplete(module: nn.Module, computed: Collection[int]) -> bool:
    """Tell whether a layer of PEFT still has tensors on the meta device.

    (Where rows of an embedding are trained, the old rows stay there: no merge reads them.)

    Args:
        computed: ids of buffers of the base that are not in its files. No merge reads them either.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    tensors = (*module.parameters(), *module.buffers())
    return isinstance(module, BaseTunerLayer) and any(
        tensor.is_meta and id(tensor) not in computed for tensor in tensors
    )


def restore_index_tables(module: nn.Module) -> None:
    """Compute OFT's tables of indices, which PEFT does not save, from the block size."""
    import torch
    from peft.tuners.oft.layer import OFTRotationModule

    for one in module.modules():
        if isinstance(one, OFTRotationModule):
            one.rows, one.cols = torch.triu_indices(one.block_size, one.block_size, 1)


@contextmanager
def with_values(module: nn.Module, values: dict[int, Tensor]) -> Iterator[None]:
    """Put values in place of parameters and buffers, and take them out again at the end.

    Args:
        values: id of a parameter or buffer -> its values.
    """
    from torch import nn

    replaced: list[tuple[Any, str, Tensor]] = [
        (held, name, tensor)
        for one in module.modules()
        for held in (one._parameters, one._buffers)
        for name, tensor in held.items()
        if tensor is not None and id(tensor) in values
    ]
    for held, name, tensor in replaced:
        value = values[id(tensor)]
        is_parameter = isinstance(tensor, nn.Parameter)
        held[name] = nn.Parameter(value, requires_grad=False) if is_parameter else value
    try:
        yield
    finally:
        for held, name, tensor in replaced:
            held[name] = tensor
        for merged in (getattr(one, "merged_adapters", []) for one in module.modules()):
            merged.clear()
