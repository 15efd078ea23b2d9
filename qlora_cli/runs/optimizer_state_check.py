"""Check a saved optimizer state against the state of a real first step.

`Optimizer.load_state_dict` accepts anything. A fused or 8-bit step would then read and write as
many numbers as the parameter has, beyond the end of a tensor that is too small.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict, defaultdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def check_optimizer(saved: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
    """Check that `optimizer` can load a saved state.

    Args:
        saved: from `Optimizer.state_dict`.

    Raises:
        ValueError, TypeError, KeyError, AttributeError: it cannot.
    """
    groups = optimizer.state_dict()["param_groups"]
    for group, found in zip(groups, saved["param_groups"], strict=True):
        if _types(group) != _types(found) or group["params"] != found["params"]:
            raise ValueError("the settings of the optimizer belong to another one")
    # Layers have the same shapes, so there are few different ones.
    known: dict[tuple[int, torch.Size, torch.dtype], dict[str, Any]] = {}
    parameters = [(i, p) for i, one in enumerate(optimizer.param_groups) for p in one["params"]]
    for index, state in saved["state"].items():
        if type(index) is not int or not 0 <= index < len(parameters):
            raise ValueError(f"the optimizer has no parameter {index!r}")
        at, parameter = parameters[index]
        kind = (at, parameter.shape, parameter.dtype)
        if kind not in known:
            known[kind] = _first_state(optimizer, at, parameter)
        _check_alike(state, known[kind], "the state")


def _types(group: dict[str, Any]) -> dict[str, Any]:
    return {
        name: [type(one) for one in value] if isinstance(value, tuple) else type(value)
        for name, value in group.items()
        if name != "params"
    }


def _first_state(optimizer: torch.optim.Optimizer, at: int, parameter: Tensor) -> dict[str, Any]:
    """The state that this optimizer creates for a parameter like this one, in its group `at`."""
    import torch

    # On the CPU: bitsandbytes never releases paged memory.
    other = torch.zeros(parameter.shape, dtype=parameter.dtype, requires_grad=True)
    other.grad = torch.zeros_like(other)
    groups = [{**group, "params": []} for group in optimizer.param_groups]
    groups[at]["params"] = [other]
    twin: torch.optim.Optimizer = object.__new__(type(optimizer))
    vars(twin).update(vars(optimizer))
    twin.state, twin.param_groups = defaultdict(dict), groups
    twin._optimizer_step_pre_hooks = OrderedDict()
    twin._optimizer_step_post_hooks = OrderedDict()
    with warnings.catch_warnings():
        # A paged optimizer takes this step on the CPU on purpose: only shapes and dtypes matter.
        warnings.filterwarnings("ignore", "Paged optimizers are not supported on CPU")
        twin.step()
    state: dict[str, Any] = twin.state_dict()["state"].get(0, {})
    return state


def _check_alike(found: Any, wanted: Any, name: str) -> None:
    """Compare names, types, dtypes and shapes at every depth."""
    import torch

    if type(found) is not type(wanted):
        raise ValueError(f"{name} of the optimizer is a {type(found).__name__}")
    if isinstance(wanted, torch.Tensor):
        if (found.dtype, found.shape) != (wanted.dtype, wanted.shape):
            raise ValueError(f"{name} of the optimizer is {found.dtype} {tuple(found.shape)}")
        return
    if not isinstance(wanted, dict):
        return
    if set(found) != set(wanted):
        raise ValueError(f"the optimizer does not keep {', '.join(map(str, found))}")
    for key, value in wanted.items():
        _check_alike(found[key], value, key)
