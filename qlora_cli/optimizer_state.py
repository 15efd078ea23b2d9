"""What an optimizer may hold, told from its own parameters.

`Optimizer.load_state_dict` takes anything; a fused or 8-bit step then reads and writes as many
numbers as a parameter has, wherever they lie.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_LIKE_THE_PARAMETER = {"exp_avg", "exp_avg_sq", "state1", "state2"}
_NAMES = (
    {"step", "exp_avg", "exp_avg_sq"},
    {"step", "state1", "state2"},
    {"step", "state1", "state2", "qmap1", "qmap2", "absmax1", "absmax2"},
)
"""What torch's and bitsandbytes' optimizers keep of a parameter."""
_INNER = "__bnb_optimizer_quant_state__"
_LEVELS = _BLOCK = 256
"""Of bitsandbytes' 8-bit optimizers: values of a state, and values that share a maximum."""


def check_optimizer(saved: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
    """See whether a saved state is one that `optimizer` may take.

    Args:
        saved: as from `Optimizer.state_dict`.

    Raises:
        ValueError, TypeError, KeyError, AttributeError: it is not.
    """
    groups = optimizer.state_dict()["param_groups"]
    for group, found in zip(groups, saved["param_groups"], strict=True):
        if _types(group) != _types(found) or group["params"] != found["params"]:
            raise ValueError("the settings of the optimizer are of another optimizer")
    parameters = [one for group in optimizer.param_groups for one in group["params"]]
    for index, state in saved["state"].items():
        if type(index) is not int or not 0 <= index < len(parameters):
            raise ValueError(f"the optimizer has no parameter {index!r}")
        flat = {name: one for name, one in state.items() if name != _INNER}
        flat |= state.get(_INNER, {})
        _check_state(flat, parameters[index])


def _types(group: dict[str, Any]) -> dict[str, Any]:
    return {
        name: [type(one) for one in value] if isinstance(value, tuple) else type(value)
        for name, value in group.items()
        if name != "params"
    }


def _check_state(state: dict[str, Any], parameter: Tensor) -> None:
    import torch

    if set(state) not in _NAMES:
        raise ValueError(f"no optimizer of ours keeps {', '.join(map(str, state))}")
    is_8_bit = "qmap1" in state
    for name, value in state.items():
        if name == "step" and type(value) is int:
            continue
        dtype = torch.uint8 if is_8_bit and name in _LIKE_THE_PARAMETER else torch.float32
        if value.dtype != dtype or value.shape != _shape(name, parameter):
            raise ValueError(f"{name} of the optimizer is {value.dtype} {tuple(value.shape)}")


def _shape(name: str, parameter: Tensor) -> torch.Size:
    import torch

    if name in _LIKE_THE_PARAMETER:
        return parameter.shape
    if name == "step":
        return torch.Size([])
    return torch.Size([_LEVELS if "qmap" in name else -(-parameter.numel() // _BLOCK)])
