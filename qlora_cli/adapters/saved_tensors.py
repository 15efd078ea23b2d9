"""Match the tensors of a saved adapter with the model that they belong to."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_cli.common.formatting import first_names
from qlora_cli.errors import ModelError

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import Tensor
    from transformers import PreTrainedModel

_SAVED = "base_model.model."
_WRAPPERS = re.compile(r"\.(base_layer|token_adapter|modules_to_save|original_module)\b")
"""The parts that PEFT inserts between a module's name and its weight."""
_MAX_NAMED = 5

# Initializations that leave the base unchanged. The others (PiSSA, OLoRA, CorDA, LoftQ ...)
# subtract the initial update from the base's weights, so the adapter does not fit those on disk.
_ADDITIVE = (True, False, "gaussian", "eva", "orthogonal")


def refuse_changed_base(config: PeftConfig, folder: Path) -> None:
    """Raise ModelError if the adapter belongs to a base that its initialization changed."""
    initialization = getattr(config, "init_lora_weights", True)
    if initialization not in _ADDITIVE:
        raise ModelError(
            f"{folder}: init_lora_weights ({initialization}) changed the base when training began, "
            "so the adapter does not belong to the weights on disk",
            hint="save it again with PEFT's save_pretrained("
            "path_initial_model_for_weight_conversion=...), which makes it a plain LoRA",
        )


def grow_vocabulary(
    model: PreTrainedModel, saved: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """Resize the base's vocabulary to the one that the adapter was saved with.

    Args:
        saved: the shape of each tensor of the adapter.

    Returns:
        The new shape of each resized weight.
    """
    modules = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    embeddings = {
        f"{name}.weight": module.weight
        for name, module in model.named_modules()
        if id(module) in modules
    }
    rows = [
        shape[0]
        for name, shape in saved.items()
        if _WRAPPERS.sub("", name.removeprefix(_SAVED)) in embeddings
    ]
    known = max((weight.shape[0] for weight in embeddings.values()), default=0)
    if not rows or max(rows) == known:
        return {}
    model.resize_token_embeddings(max(rows), mean_resizing=False)
    return {name: (max(rows), *weight.shape[1:]) for name, weight in embeddings.items()}


def match_saved(
    adapted: Any,
    saved: Mapping[str, tuple[int, ...]],
    base_ids: Collection[int],
    folder: Path,
    adapter_name: str = "default",
) -> dict[int, list[str]]:
    """Find the parameter of each saved tensor: id of the parameter -> its names in the file.

    PEFT only warns of missing tensors and continues with random values in their place.

    Args:
        saved: the shape of each tensor of the adapter.
        base_ids: ids of the base's parameters, which need not be saved with the adapter.

    Raises:
        ModelError: they do not match, tensor for tensor.
    """
    from peft import get_peft_model_state_dict

    state = adapted.state_dict(keep_vars=True)
    live: dict[str, Tensor] = {}
    for with_embeddings in (False, True):
        live = get_peft_model_state_dict(
            adapted,
            state_dict=state,
            adapter_name=adapter_name,
            save_embedding_layers=with_embeddings,
        )
        if set(saved) <= set(live):
            break
    missing = {key for key in live if key not in saved and id(live[key]) not in base_ids}
    wrong = {
        f"{key} {tuple(shape)} instead of {tuple(live[key].shape)}"
        for key, shape in saved.items()
        if key in live and tuple(shape) != tuple(live[key].shape)
    }
    unexpected = set(saved) - set(live)
    if missing or unexpected or wrong:
        raise mismatch(folder, missing=missing, unexpected=unexpected, wrong_shape=wrong)
    matched: dict[int, list[str]] = {}
    for key in saved:
        matched.setdefault(id(live[key]), []).append(key)
    return matched


def mismatch(folder: Path, **problems: Collection[str]) -> ModelError:
    """Return the error for saved tensors that do not fit the model.

    Args:
        problems: kind of problem (`missing`, `unexpected`, `wrong_shape`) -> names of tensors.
    """
    parts = [
        f"{kind.replace('_', ' ')}: {first_names(sorted(names), _MAX_NAMED)}"
        for kind, names in problems.items()
        if names
    ]
    return ModelError(f"{folder} does not fit the base model; {'; '.join(parts)}")
