"""A saved state is taken where it fits the parameters, number for number."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from qlora_cli.optim.families import AdamW
from qlora_cli.runs.optimizer_state_check import check_optimizer
from tests.conftest import each_optimizer

OPTIMIZERS = each_optimizer()


def stepped(config: Any) -> torch.optim.Optimizer:
    """After a step, on a large matrix (8 bit, where that is asked for), a small one and a bias; and
    on one outside of the layers, which is not Muon's."""
    shapes = {
        "layers.0.weight": (100, 100),
        "layers.1.weight": (10, 10),
        "layers.1.bias": (5,),
        "head.weight": (7, 10),
    }
    named = {name: torch.nn.Parameter(torch.ones(shape)) for name, shape in shapes.items()}
    optimizer: torch.optim.Optimizer = config.build(named.items(), torch.device("cpu"))
    for parameter in named.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("config", OPTIMIZERS, ids=lambda config: config.type)
def test_an_optimizer_accepts_its_own_state(config: Any) -> None:
    optimizer = stepped(config)
    check_optimizer(optimizer.state_dict(), optimizer)


def inner(state: dict[str, Any]) -> dict[str, Any]:
    return state.get("__bnb_optimizer_quant_state__", state)


def first_tensor(state: dict[str, Any]) -> str:
    """The name of one with the shape of the parameter, or of its rows."""
    return next(n for n, v in inner(state).items() if isinstance(v, torch.Tensor) and v.ndim > 1)


def shorten(state: dict[str, Any]) -> None:
    inner(state)[first_tensor(state)] = inner(state)[first_tensor(state)][:1]


def as_double(state: dict[str, Any]) -> None:
    inner(state)[first_tensor(state)] = inner(state)[first_tensor(state)].double()


def leave_out(state: dict[str, Any]) -> None:
    del inner(state)[first_tensor(state)]


def add(state: dict[str, Any]) -> None:
    state["more"] = torch.ones(1)


def spoil_step(state: dict[str, Any]) -> None:
    state["step"] = None


@pytest.mark.parametrize("config", OPTIMIZERS, ids=lambda config: config.type)
@pytest.mark.parametrize("spoil", [shorten, as_double, leave_out, add, spoil_step])
def test_a_state_that_does_not_fit_is_refused(
    config: Any, spoil: Callable[[dict[str, Any]], None]
) -> None:
    optimizer = stepped(config)
    saved = copy.deepcopy(optimizer.state_dict())
    spoil(saved["state"][0])
    with pytest.raises((ValueError, AttributeError)):
        check_optimizer(saved, optimizer)


@pytest.mark.parametrize("name", ["qmap1", "absmax2"])
def test_the_maps_of_8_bit_states_have_their_sizes(name: str) -> None:
    optimizer = stepped(AdamW(type="adamw_8bit"))
    saved = copy.deepcopy(optimizer.state_dict())
    inner(saved["state"][0])[name] = torch.ones(3)
    with pytest.raises(ValueError, match=name):
        check_optimizer(saved, optimizer)


@pytest.mark.parametrize(
    ("key", "value"), [("betas", (0.9,)), ("betas", None), ("lr", "x"), ("params", [0])]
)
def test_other_settings_are_refused(key: str, value: Any) -> None:
    optimizer = stepped(AdamW())
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0][key] = value
    with pytest.raises(ValueError, match="settings of the optimizer"):
        check_optimizer(saved, optimizer)


def test_state_of_a_missing_parameter_is_refused() -> None:
    optimizer = stepped(AdamW())
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][7] = saved["state"][0]
    with pytest.raises(ValueError, match="no parameter 7"):
        check_optimizer(saved, optimizer)
