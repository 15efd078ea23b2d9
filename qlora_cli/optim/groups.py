"""Learning rates and weight decays of groups of trained parameters."""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field, field_validator, model_validator

from qlora_cli.common.config import Config
from qlora_cli.errors import RecipeError

if TYPE_CHECKING:
    from torch.nn import Parameter

log = logging.getLogger("qlora")

NamedParameters = Iterable[tuple[str, "Parameter"]]
"""The result of `Module.named_parameters`."""


class ParameterGroup(Config):
    """Trained parameters with their own settings."""

    match: str = Field(min_length=1)
    """Regular expression, searched for in the names of trained parameters, such as `lora_B` or
    `layers\\.0\\.`. A parameter belongs to the first group that it matches."""
    learning_rate: float | None = Field(None, gt=0)
    """Peak learning rate of these parameters; null takes that of the optimizer."""
    weight_decay: float | None = Field(None, ge=0)
    """Weight decay of these parameters, biases and norms included; null takes that of the
    optimizer."""

    @field_validator("match")
    @classmethod
    def _compiles(cls, value: str) -> str:
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"{value} is not a valid regular expression: {error}") from error
        return value

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.learning_rate is None and self.weight_decay is None:
            raise ValueError("sets nothing: give it a learning_rate, a weight_decay or both")
        return self


def group_parameters(
    parameters: NamedParameters,
    groups: Mapping[str, ParameterGroup],
    *,
    learning_rate: float,
    weight_decay: float,
) -> list[dict[str, Any]]:
    """Sort trained parameters into the groups of a torch optimizer, those in no group first.

    Each group becomes two of torch's, matrices and others, because by default weight decay applies
    only to matrices: on biases, norms and DoRA magnitudes it only does harm. The schedule scales
    `initial_lr` and writes the result to `lr`, which the step uses.

    Args:
        groups: by their key in the recipe, for messages.
        learning_rate: peak learning rate of parameters in no group.
        weight_decay: weight decay of matrices in no group.

    Raises:
        RecipeError: a group has no parameter.
    """
    trained = {name: p for name, p in parameters if p.requires_grad}
    members = _members(list(trained), groups)
    result, lines = [], []
    for key, names in members.items():
        rate, decays = learning_rate, (weight_decay, 0.0)
        if (group := groups.get(key)) is not None:
            rate = learning_rate if group.learning_rate is None else group.learning_rate
            decays = decays if group.weight_decay is None else (group.weight_decay,) * 2
        number = f"{len(names)} tensor{'s' * (len(names) > 1)}"
        lines.append(f"{key}: {number}, learning rate {rate:g}, weight decay {decays[0]:g}")
        group_members = [trained[name] for name in names]
        matrices = [p for p in group_members if p.ndim >= 2]
        others = [p for p in group_members if p.ndim < 2]
        result += [
            {"params": params, "weight_decay": decay, "initial_lr": rate}
            for params, decay in zip((matrices, others), decays, strict=True)
            if params
        ]
    log.log(logging.INFO if groups else logging.DEBUG, "%s", "; ".join(lines))
    return result


def _members(names: list[str], groups: Mapping[str, ParameterGroup]) -> dict[str, list[str]]:
    """Return the names of each group, those in no group first, under "optimizer"."""
    members: dict[str, list[str]] = {"optimizer": [], **{key: [] for key in groups}}
    for name in names:
        key = next((k for k, group in groups.items() if re.search(group.match, name)), "optimizer")
        members[key].append(name)
    for key, group in groups.items():
        if not members[key]:
            raise _empty(key, group.match, names)
    return {key: found for key, found in members.items() if found}


def _empty(key: str, pattern: str, names: list[str]) -> RecipeError:
    taken = [name for name in names if re.search(pattern, name)]
    if taken:
        return RecipeError(
            f"{key}: all parameters that match {pattern!r} ({taken[0]} ...) are in earlier groups",
            hint="put the narrower pattern first",
        )
    pieces = sorted({piece for name in names for piece in name.split(".")})
    near = difflib.get_close_matches(pattern, [*pieces, *names], n=3, cutoff=0.5)
    return RecipeError(
        f"{key}: {pattern!r} matches none of the {len(names)} trained parameters, such as "
        f"{', '.join(names[:2])}",
        hint=f"did you mean {' or '.join(near)}?" if near else None,
    )
