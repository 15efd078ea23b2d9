"""Which learning rate and weight decay each trained parameter has."""

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
"""As from `Module.named_parameters`."""


class ParameterGroup(Config):
    """Trained parameters with settings of their own."""

    match: str = Field(min_length=1)
    """Regular expression that is searched for in the names of trained parameters, such as
    `lora_B` or `layers\\.0\\.`. A parameter belongs to the first group that it matches."""
    learning_rate: float | None = Field(None, gt=0)
    """Highest learning rate of these; null takes that of the optimizer."""
    weight_decay: float | None = Field(None, ge=0)
    """Of all that match, biases and norms too; null takes that of the optimizer."""

    @field_validator("match")
    @classmethod
    def _compiles(cls, value: str) -> str:
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"{value} is no regular expression: {error}") from error
        return value

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.learning_rate is None and self.weight_decay is None:
            raise ValueError("sets nothing; give it a learning_rate, a weight_decay or both")
        return self


def group_parameters(
    parameters: NamedParameters,
    groups: Mapping[str, ParameterGroup],
    *,
    learning_rate: float,
    weight_decay: float,
) -> list[dict[str, Any]]:
    """Trained parameters as torch's optimizers take them: those of no group first.

    Each group is two of torch's, of matrices and of the rest, because weight decay is for matrices
    alone where no group says otherwise: on biases, norms and DoRA magnitudes it only does harm.
    `initial_lr` is what the schedule scales; `lr` is what the step then uses.

    Args:
        groups: by the key of the recipe that they come from, for messages.

    Raises:
        RecipeError: a group has no parameter.
    """
    trained = {name: p for name, p in parameters if p.requires_grad}
    members = _members(list(trained), groups)
    made, told = [], []
    for key, names in members.items():
        rate, decays = learning_rate, (weight_decay, 0.0)
        if (group := groups.get(key)) is not None:
            rate = learning_rate if group.learning_rate is None else group.learning_rate
            decays = decays if group.weight_decay is None else (group.weight_decay,) * 2
        number = f"{len(names)} tensor{'s' * (len(names) > 1)}"
        told.append(f"{key}: {number}, learning rate {rate:g}, weight decay {decays[0]:g}")
        some = [trained[name] for name in names]
        cut = [p for p in some if p.ndim >= 2], [p for p in some if p.ndim < 2]
        made += [
            {"params": params, "weight_decay": one, "initial_lr": rate}
            for params, one in zip(cut, decays, strict=True)
            if params
        ]
    log.info("%s", "; ".join(told))
    return made


def _members(names: list[str], groups: Mapping[str, ParameterGroup]) -> dict[str, list[str]]:
    """The names of each group; of those in none, under "optimizer", first."""
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
            f"{key}: all that {pattern!r} matches ({taken[0]} ...) is in groups before it",
            hint="put the narrower pattern first",
        )
    pieces = sorted({piece for name in names for piece in name.split(".")})
    near = difflib.get_close_matches(pattern, [*pieces, *names], n=3, cutoff=0.5)
    return RecipeError(
        f"{key}: {pattern!r} matches no trained parameter; there are {len(names)}, such as "
        f"{', '.join(names[:2])}",
        hint=f"did you mean {' or '.join(near)}?" if near else None,
    )
