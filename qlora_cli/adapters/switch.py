"""Several adapters over one base model in memory, one of them (or none) at work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_cli.adapters.files import read_adapter, refuse_slow_patterns
from qlora_cli.adapters.weight_edits import match_saved, refuse_changed_base
from qlora_cli.errors import ModelError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


class AdapterSet:
    """A base model with named adapters. The base's weights are in memory once.

    Args:
        base: is changed: PEFT puts its layers into it.
    """

    def __init__(self, base: PreTrainedModel) -> None:
        self._base = base
        self._model: PeftModel | None = None
        self._keys: dict[str, str] = {}
        self._own = {id(parameter) for parameter in base.parameters()}

    def add(self, name: str, folder: Path) -> None:
        """Put a saved adapter on the base.

        Raises:
            ModelError: it does not fit the base tensor for tensor, or not beside the others.
        """
        from peft import set_peft_model_state_dict

        from qlora_cli.adapters.peft_base import adapt, use_our_layers

        config, saved = read_adapter(folder)
        refuse_changed_base(config, folder)
        refuse_slow_patterns(config, [name for name, _ in self._base.named_modules()], folder)
        # Whether the base is the right one is told from its weights and not from its path.
        config.base_model_name_or_path = None
        # What the user calls it may be no name for a module.
        key = f"adapter_{len(self._keys)}"
        try:
            if self._model is None:
                self._model = adapt(self._base, config, key)
            else:
                use_our_layers(config, self._base)
                self._model.add_adapter(key, config)
            assert self._model is not None
            # float32 first: copied into a 16-bit module, what was trained would be rounded.
            for path, parameter in self._model.named_parameters():
                if key in path.split("."):
                    parameter.data = parameter.data.float()
            shapes = {path: tuple(tensor.shape) for path, tensor in saved.items()}
            match_saved(self._model, shapes, self._own, folder, key)
            set_peft_model_state_dict(self._model, saved, adapter_name=key)
        except ModelError:
            raise
        # PEFT checks no types: what is wrong fails wherever it is used first.
        except Exception as error:
            raise ModelError(f"{folder} does not fit the base model: {error}") from error
        self._model.eval().requires_grad_(False)
        self._keys[name] = key

    @contextmanager
    def using(self, name: str | None) -> Iterator[Any]:
        """The model with one of the adapters; None is the base as it is without any."""
        if self._model is None:
            assert name is None
            yield self._base
            return
        if name is not None:
            self._model.set_adapter(self._keys[name], inference_mode=True)
        with nullcontext() if name is not None else self._model.disable_adapter():
            yield self._model
