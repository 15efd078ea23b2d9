"""Add, load and save adapters with PEFT."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_cli.errors import ModelError
from qlora_cli.models.heads import refuse_missing_head

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch import nn
    from transformers import PreTrainedModel


@contextmanager
def peft_errors(message: str, find_hint: Callable[[str], str] | None = None) -> Iterator[None]:
    """Turn any error of PEFT's into a ModelError that begins with `message`.

    PEFT checks no types, so a wrong setting fails in any way, wherever it is used first.

    Args:
        find_hint: returns the way out of an error with this text; empty if there is none.
    """
    try:
        yield
    except ModelError:
        raise
    # PEFT raises any kind of error for settings or files that do not fit.
    except Exception as error:
        hint = find_hint(str(error)) if find_hint else ""
        raise ModelError(f"{message}: {error}", hint=hint or None) from error


def incompatible_hint(said: str) -> str:
    """Name the setting that leaves out the module that PEFT cannot train, such as Mamba's.

    Args:
        said: PEFT's error.
    """
    module = incompatible_module(said)
    return f"--set adapter.exclude_modules=[{module}]" if module else ""


def incompatible_module(said: str) -> str:
    """Return the module that PEFT refuses in this model, by its error; empty if it names none."""
    found = re.search(r"Module '([\w.]+)' is incompatible", said)
    return found[1] if found else ""


def add_adapter(model: PreTrainedModel, config: PeftConfig) -> PeftModel:
    """Wrap a base model with PEFT and cast what is trained to float32."""
    adapted = wrap_with_peft(model, config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            # Bfloat16 loses updates that are smaller than the spacing of its values.
            parameter.data = parameter.data.float()
    return adapted


def wrap_with_peft(
    model: PreTrainedModel, config: PeftConfig, adapter_name: str = "default"
) -> PeftModel:
    """Wrap a base model with PEFT, with our LoRA layers and our insertion of virtual tokens.

    Raises:
        ValueError: PEFT refuses the settings, or the kind of virtual tokens is not supported.
    """
    from peft import PeftModel, get_peft_model

    from qlora_cli.adapters.layers.virtual_tokens import insert_virtual_tokens

    if not config.is_prompt_learning:
        register_lora_layers(config, model)
        return get_peft_model(model, config, adapter_name=adapter_name)
    # PEFT's class for causal language models would insert the virtual tokens a second time.
    adapted = PeftModel(model, config, adapter_name)
    insert_virtual_tokens(adapted)
    return adapted


def register_lora_layers(config: Any, model: nn.Module) -> None:
    """Make PEFT use our LoRA layers; types that are derived from LoRA keep PEFT's own."""
    from qlora_cli.kernels.peft_lora_layers import lora_layer_classes

    if config.peft_type == "LORA":
        config._register_custom_module(lora_layer_classes(model))


def load_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    """Add a saved adapter (of any PEFT type) to its base model; its weights stay trainable.

    Raises:
        ModelError: the adapter does not fit the model tensor for tensor.
    """
    from peft import set_peft_model_state_dict

    from qlora_cli.adapters.files import read_adapter, refuse_slow_patterns
    from qlora_cli.adapters.saved_tensors import grow_vocabulary, match_saved, refuse_changed_base

    config, saved = read_adapter(folder)
    refuse_changed_base(config, folder)
    refuse_slow_patterns(config, [name for name, _ in model.named_modules()], folder)
    config.inference_mode = False  # the saved value would freeze the trained weights
    with peft_errors(f"{folder} does not fit the base model"):
        shapes = {name: tuple(tensor.shape) for name, tensor in saved.items()}
        grow_vocabulary(model, shapes)
        base_ids = {id(parameter) for parameter in model.parameters()}
        # Cast to float32 before loading: copied into 16 bit, trained values would be rounded.
        adapted = add_adapter(model, config)
        match_saved(adapted, shapes, base_ids, folder)
        set_peft_model_state_dict(adapted, saved)
    refuse_missing_head(model, folder)
    return adapted


def save_adapter(model: PeftModel, folder: Path, **options: Any) -> None:
    """Write an adapter in PEFT's format; `options` are those of PEFT's `save_pretrained`."""
    # "auto" would ask the Hub whether the base's vocabulary has grown.
    model.save_pretrained(folder, save_embedding_layers=False, **options)
    # PEFT writes a model card template with nothing filled in.
    (folder / "README.md").unlink()
