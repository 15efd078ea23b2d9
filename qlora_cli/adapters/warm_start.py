"""Start a LoRA from the weights of a saved one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_cli.adapters.files import read_adapter
from qlora_cli.adapters.saved_tensors import match_saved, refuse_changed_base
from qlora_cli.common.decoder import SCORE, score_layer
from qlora_cli.errors import ModelError

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

_HEAD = f".{SCORE}.weight"
"""End of the name of a head's weight in an adapter."""
_SETTINGS = {
    "peft_type": "type",
    "r": "r",
    "lora_alpha": "alpha",
    "rank_pattern": "rank_pattern",
    "alpha_pattern": "alpha_pattern",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
    "modules_to_save": "modules_to_save",
}
"""Settings of PEFT's config that must agree for weights to mean the same -> our names of them."""


def load_initial_weights(model: PeftModel, folder: Path) -> None:
    """Replace the weights that `LoRA.attach` initialized by those of a saved adapter.

    A head that scores rows keeps its initial weights if the saved adapter has none: it was trained
    on answers.

    Raises:
        ModelError: it was trained with other settings, or does not fit tensor for tensor.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    config, saved = read_adapter(folder)
    refuse_changed_base(config, folder)
    live = get_peft_model_state_dict(model, save_embedding_layers=False)
    keeps_head = score_layer(model.get_base_model()) is not None and not any(
        name.endswith(_HEAD) for name in saved
    )
    if keeps_head:
        saved |= {name: own for name, own in live.items() if name.endswith(_HEAD)}
    _refuse_other_settings(
        config, model.peft_config["default"], saved, live, folder, keeps_head=keeps_head
    )
    frozen = {id(parameter) for parameter in model.parameters() if not parameter.requires_grad}
    match_saved(model, {name: tuple(t.shape) for name, t in saved.items()}, frozen, folder)
    if bad := [name for name, tensor in saved.items() if not tensor.isfinite().all()]:
        raise ModelError(f"{folder}: {len(bad)} tensors are not finite (such as {bad[0]})")
    set_peft_model_state_dict(model, saved)


def _refuse_other_settings(
    config: PeftConfig,
    live: PeftConfig,
    saved: Iterable[str],
    wanted: Iterable[str],
    folder: Path,
    *,
    keeps_head: bool,
) -> None:
    """Raise ModelError, which lists all differences, if the adapter has other settings.

    Args:
        config: settings of the adapter in `folder`.
        live: settings of the model that its weights go into.
        saved: names of the adapter's tensors.
        wanted: names of the model's tensors.
        keeps_head: the model has a head that scores rows, which PEFT names in `modules_to_save`.
    """
    from peft.utils.constants import SEQ_CLS_HEAD_NAMES

    pairs: dict[str, list[Any]] = {
        ours: [getattr(one, name, None) for one in (config, live)]
        for name, ours in _SETTINGS.items()
    }
    if keeps_head:
        own = [name for name in pairs["modules_to_save"][1] or () if name not in SEQ_CLS_HEAD_NAMES]
        pairs["modules_to_save"][1] = own
    # Compare what the targets matched: a list, a pattern and `all-linear` may match the same.
    pairs["target_modules"] = [_targets(names) for names in (saved, wanted)]
    lines = [
        f"adapter.{key}: {old} -> {new}"
        for key, (old, new) in pairs.items()
        if (old or None) != (new or None)
    ]
    if lines:
        raise ModelError(
            "\n".join([f"adapter.init_from: {folder} was trained with other settings", *lines]),
            hint="its weights are valid only with its own settings; give the recipe the same",
        )


def _targets(names: Iterable[str]) -> str:
    """Return the kinds of modules that have an update, with the number of each."""
    updated = {name.partition(".lora_")[0] for name in names if ".lora_" in name}
    kinds = Counter(name.rpartition(".")[2] for name in updated)
    return ", ".join(f"{number} {kind}" for kind, number in sorted(kinds.items()))
