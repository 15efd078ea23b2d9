"""Several adapters on one base model in memory, with one or none active."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_cli.adapters.files import read_adapter, refuse_slow_patterns
from qlora_cli.adapters.peft_base import peft_errors, register_lora_layers, wrap_with_peft
from qlora_cli.adapters.saved_tensors import match_saved, refuse_changed_base
from qlora_cli.models.heads import refuse_missing_head

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


class AdapterSet:
    """A base model with named adapters. The base's weights are in memory once.

    Args:
        base: changed in place: PEFT replaces its layers.
    """

    def __init__(self, base: PreTrainedModel) -> None:
        self._base = base
        self._model: PeftModel | None = None
        self._keys: dict[str, str] = {}
        self._base_ids = {id(parameter) for parameter in base.parameters()}

    def add(self, name: str, folder: Path) -> None:
        """Add a saved adapter to the base under a name.

        Raises:
            ModelError: it does not fit the base tensor for tensor, or not next to the others.
        """
        from peft import set_peft_model_state_dict

        config, saved = read_adapter(folder)
        refuse_changed_base(config, folder)
        refuse_slow_patterns(config, [name for name, _ in self._base.named_modules()], folder)
        # The base is identified by its weights, not by its path.
        config.base_model_name_or_path = None
        # The user's name may not be a valid name of a module.
        key = f"adapter_{len(self._keys)}"
        with peft_errors(f"{folder} does not fit the base model"):
            if self._model is None:
                self._model = wrap_with_peft(self._base, config, key)
            else:
                register_lora_layers(config, self._base)
                self._model.add_adapter(key, config)
            assert self._model is not None
            # Cast to float32 before loading: copied into 16 bit, trained values would be rounded.
            for path, parameter in self._model.named_parameters():
                if key in path.split("."):
                    parameter.data = parameter.data.float()
            shapes = {path: tuple(tensor.shape) for path, tensor in saved.items()}
            match_saved(self._model, shapes, self._base_ids, folder, key)
            set_peft_model_state_dict(self._model, saved, adapter_name=key)
        refuse_missing_head(self._base, folder)
        self._model.eval().requires_grad_(False)
        self._keys[name] = key

    @contextmanager
    def using(self, name: str | None) -> Iterator[Any]:
        """Yield the model with one adapter active, or the plain base for None."""
        if self._model is None:
            assert name is None
            yield self._base
            return
        if name is not None:
            self._model.set_adapter(self._keys[name], inference_mode=True)
        with nullcontext() if name is not None else self._model.disable_adapter():
            yield self._model
