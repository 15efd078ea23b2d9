"""The settings that choose which modules of the base a PEFT method changes.

A method declares those of these fields that its PEFT config takes, names `check_targets` and (with
`layers_to_transform`) `check_layers` among its checks, and passes `target_settings` to its config.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, Field

from qlora_cli.common.config import Config
from qlora_cli.common.decoder import score_layer
from qlora_cli.common.formatting import value_text
from qlora_cli.errors import ModelError
from qlora_cli.models.heads import task_type

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

Modules = list[str] | str
"""Names of modules, or one regular expression."""


def _refuse_truth_value(value: list[str] | str | None) -> list[str] | str | None:
    """Refuse `true` and the like, which other tools take for "all linear layers"."""
    for name in value if isinstance(value, list) else [value]:
        if name is not None and name.lower() in _TRUTH_VALUES:
            raise ValueError(
                f"found {value_text(name)}, which names no module; it takes names of modules or a "
                "regular expression, and target_modules takes all-linear for all linear layers"
            )
    return value


_TRUTH_VALUES = {"true", "false", "yes", "no", "on", "off"}

SomeModules = Annotated[Modules | None, AfterValidator(_refuse_truth_value)]
"""Names of modules, one regular expression, or null."""
TargetModules = Annotated[
    Literal["all-linear"] | Modules | None,
    AfterValidator(_refuse_truth_value),
    Field(
        description="`all-linear` (all linear layers except the head), a list of module names, or "
        "one regular expression; null takes PEFT's default for this kind of model."
    ),
]
ModulesToSave = Annotated[
    list[str],
    Field(
        description="Modules that are trained in full and saved with the adapter, such as "
        "`lm_head`."
    ),
]
LayersToTransform = Annotated[
    list[Annotated[int, Field(ge=0)]] | None,
    Field(
        description="Indices of the layers that get the update (the first is 0); null means all."
    ),
]
ExcludeModules = Annotated[
    Modules | None,
    AfterValidator(_refuse_truth_value),
    Field(description="Modules to leave out: names, or one regular expression."),
]

_PEFT_FIELDS = {"target_modules", "modules_to_save", "layers_to_transform", "exclude_modules"}
_NAME_FIELDS = {"target_modules", "exclude_modules", "feedforward_modules"}


def target_settings(method: Config, model: PreTrainedModel) -> dict[str, Any]:
    """Return the arguments for PEFT's config that all methods with targets share."""
    settings = method.model_dump(include=_PEFT_FIELDS)
    settings["modules_to_save"] = settings["modules_to_save"] or None
    is_layered = settings.get("layers_to_transform") is not None
    if is_layered and settings["target_modules"] == "all-linear":
        settings["target_modules"] = _linear_names(model)  # PEFT needs a list to select layers
    return {"task_type": task_type(model), **settings}


def check_targets(method: Any, model: PreTrainedModel) -> None:
    """Raise ModelError if a module name in the settings matches no module of the model."""
    modules = leaf_modules(model)
    for key, value in method.model_dump(include=_NAME_FIELDS).items():
        if isinstance(value, list):
            require_each(f"adapter.{key}", value, modules, is_suffix)
        elif _is_expression(value):
            require_each(f"adapter.{key}", [value], modules, _is_full_match)
    require_each("adapter.modules_to_save", method.modules_to_save, modules, is_suffix)


def check_layers(method: Any, model: PreTrainedModel) -> None:
    """Raise ModelError if `layers_to_transform` has an index that the model has not, or PEFT
    would ignore it."""
    layers, targets = method.layers_to_transform, method.target_modules
    number = model.config.get_text_config(decoder=True).num_hidden_layers
    if wrong := [layer for layer in layers or () if layer >= number]:
        raise ModelError(
            f"adapter.layers_to_transform: the model has no layer {wrong[0]}; its layers are 0 to "
            f"{number - 1}"
        )
    if layers is not None and _is_expression(targets):
        raise ModelError(
            "adapter.layers_to_transform: PEFT selects layers only for a list of names, and "
            f"adapter.target_modules is a regular expression ({targets})",
            hint="give target_modules a list, or name the layers in the expression",
        )


def check_tied_targets(method: Any, model: PreTrainedModel) -> None:
    """Raise ModelError if a target shares its matrix with another module: the update of one would
    be merged into both."""
    targets = method.target_modules
    # Some configs of transformers do not have the setting.
    is_tied = getattr(model.config, "tie_word_embeddings", False)
    if not is_tied or not isinstance(targets, list):
        return
    tied = [model.get_input_embeddings(), model.get_output_embeddings()]
    for name, module in model.named_modules():
        is_target = any(is_suffix(target, name) for target in targets)
        if is_target and any(module is one for one in tied):
            raise ModelError(
                f"adapter.target_modules: {name} shares its weights with the embedding or the "
                "head of this model, so an update of it alone cannot be merged",
                hint="adapter.modules_to_save trains them in full",
            )


def leaf_modules(model: nn.Module) -> list[str]:
    """Return the names of modules without children."""
    return [name for name, module in model.named_modules() if not list(module.children())]


# The three ways in which PEFT compares a name in its config with a module's name.
def is_suffix(wanted: str, module: str) -> bool:
    """Match an item of a list of names."""
    return module == wanted or module.endswith(f".{wanted}")


def _is_full_match(wanted: str, module: str) -> bool:
    """Match a regular expression that stands in place of a list."""
    return re.fullmatch(wanted, module) is not None


def is_pattern(wanted: str, module: str) -> bool:
    """Match a key of a mapping."""
    return re.match(rf"(.*\.)?({wanted})$", module) is not None


def require_each(
    key: str, wanted: Iterable[str], modules: list[str], matches: Callable[[str, str], bool]
) -> None:
    """Raise ModelError, with similar names, if one of `wanted` matches none of `modules`."""
    leaves = sorted({name.rpartition(".")[2] for name in modules})
    for name in wanted:
        try:
            found = any(matches(name, module) for module in modules)
        except re.error as error:
            raise ModelError(
                f"{key}: {name!r} is not a valid regular expression: {error}"
            ) from error
        if not found:
            near = difflib.get_close_matches(name, leaves, n=3)
            raise ModelError(
                f"{key}: {name!r} matches no module of the model, which has {', '.join(leaves)}",
                hint=f"did you mean {' or '.join(near)}?" if near else None,
            )


def _is_expression(modules: Any) -> bool:
    return isinstance(modules, str) and modules != "all-linear"


def _linear_names(model: PreTrainedModel) -> list[str]:
    """Return the last parts of the names of linear layers except the head: `all-linear`."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    heads = [model.get_output_embeddings(), score_layer(model)]
    return sorted(
        {
            name.rpartition(".")[2]
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear | Conv1D) and not any(module is one for one in heads)
        }
    )
