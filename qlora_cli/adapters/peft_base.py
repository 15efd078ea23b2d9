"""What all methods of PEFT share: how they are put on a model, saved, loaded and merged."""

from __future__ import annotations

import difflib
import re
from abc import abstractmethod
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from qlora_cli.adapters.base import AdapterMethod
from qlora_cli.errors import ModelError
from qlora_cli.models.heads import CAUSAL_LM

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch import nn
    from transformers import PreTrainedModel

    from qlora_cli.adapters.weight_edits import WeightEdits
    from qlora_cli.models.weight_names import WeightNames

Modules = list[str] | str
"""Names of modules, or one regular expression."""


class OfPeft(AdapterMethod):
    """A method whose weights lie beside those of the base, which stay as they are."""

    @abstractmethod
    def peft_config(self, model: PreTrainedModel) -> PeftConfig:
        """The settings in PEFT's own terms."""

    def attach(self, model: PreTrainedModel) -> PeftModel:
        """Put the method's weights beside their targets. The base is changed in place.

        Trained weights are float32. Those that are random are drawn from torch's generator.

        Raises:
            ModelError: a name matches no module, or PEFT refuses the settings for this model.
        """
        self.check(model)
        try:
            config: Any = self.peft_config(model)
            adapted = put_on(model, config)
            self.initialize(adapted)
        except ModelError:
            raise
        # PEFT checks no types: what is wrong fails wherever it is used first.
        except Exception as error:
            raise ModelError(f"adapter: PEFT refuses it: {error}") from error
        # PEFT keeps names in sets, whose order is another in each process: equal runs would not
        # write equal files.
        for key, value in vars(config).items():
            if isinstance(value, set):
                setattr(config, key, sorted(value))
        return adapted

    def check(self, model: PreTrainedModel) -> None:
        """Raises ModelError if the settings and the model do not go together."""

    def initialize(self, adapted: PeftModel) -> None:
        """Give trained weights their first values, where PEFT's are not the method's."""

    def save(self, model: PeftModel, folder: Path) -> None:
        """Write the adapter in PEFT's own format."""
        save_adapter(model, folder)

    def weight_edits(
        self, skeleton: PreTrainedModel, names: WeightNames, folder: Path
    ) -> WeightEdits:
        """What a saved adapter changes in the base (`skeleton`: on the meta device).

        Raises:
            ModelError: it is of a kind that cannot be merged.
        """
        from qlora_cli.adapters.weight_edits import AdapterEdits

        if self.no_merge:
            raise ModelError(f"adapter.type ({self.type}) cannot be merged: {self.no_merge}")
        return AdapterEdits(skeleton, names, folder)

    def load(self, model: PreTrainedModel, folder: Path) -> PeftModel:
        """Put a saved adapter, of whatever kind, on the base model it belongs to; still trainable.

        Raises:
            ModelError: it does not fit the model tensor for tensor.
        """
        from peft import set_peft_model_state_dict

        from qlora_cli.adapters.files import read_adapter, refuse_slow_patterns
        from qlora_cli.adapters.weight_edits import (
            grow_vocabulary,
            match_saved,
            refuse_changed_base,
        )

        config, saved = read_adapter(folder)
        refuse_changed_base(config, folder)
        refuse_slow_patterns(config, [name for name, _ in model.named_modules()], folder)
        config.inference_mode = False  # as saved it would freeze what was trained
        try:
            shapes = {name: tuple(tensor.shape) for name, tensor in saved.items()}
            grow_vocabulary(model, shapes)
            own = {id(parameter) for parameter in model.parameters()}
            # In float32 from here on: copied into 16 bit, what was trained would be rounded.
            adapted = put_on(model, config)
            match_saved(adapted, shapes, own, folder)
            set_peft_model_state_dict(adapted, saved)
        except ModelError:
            raise
        # PEFT checks no types: what is wrong fails wherever it is used first.
        except Exception as error:
            raise ModelError(f"{folder} does not fit the base model: {error}") from error
        return adapted


class PeftMethod(OfPeft):
    """A method that puts its weights beside modules of the base."""

    target_modules: Literal["all-linear"] | Modules | None = None
    """`all-linear` (all but the head), a list of module names, or one regular expression; null
    takes those that PEFT names for this kind of model."""
    modules_to_save: list[str] = Field([])
    """Modules trained in full and saved with the adapter, such as `lm_head`."""

    def check(self, model: PreTrainedModel) -> None:
        """Raises ModelError if a name that the settings give is none of the model's."""
        modules = _leaves(model)
        for key in ("target_modules", "exclude_modules", "feedforward_modules"):
            require_modules(key, getattr(self, key, None), modules)
        require_each("adapter.modules_to_save", self.modules_to_save, modules, is_suffix)

    def shared_settings(self, model: PreTrainedModel) -> dict[str, Any]:
        """What every config of PEFT that has targets takes under the same name."""
        return {
            "task_type": CAUSAL_LM.task_type,
            "target_modules": self.target_modules,
            "modules_to_save": self.modules_to_save or None,
        }


class Layered(PeftMethod):
    """A method of which layers can be left out."""

    target_modules: Literal["all-linear"] | Modules | None = "all-linear"
    """`all-linear` (all but the head), a list of module names, or one regular expression; null
    takes those that PEFT names for this kind of model."""
    layers_to_transform: list[Annotated[int, Field(ge=0)]] | None = None
    """Numbers of the layers that get the update (the first is 0); null means all."""

    def check(self, model: PreTrainedModel) -> None:
        """Raises ModelError if a name or a layer that the settings give is none of the model's."""
        super().check(model)
        number = model.config.get_text_config(decoder=True).num_hidden_layers
        if wrong := [layer for layer in self.layers_to_transform or () if layer >= number]:
            raise ModelError(
                f"adapter.layers_to_transform: the model has no layer {wrong[0]}; it has 0 to "
                f"{number - 1}"
            )
        if self.layers_to_transform is not None and is_expression(self.target_modules):
            raise ModelError(
                "adapter.layers_to_transform: PEFT counts layers for a list of names alone, and "
                f"adapter.target_modules is a regular expression ({self.target_modules})",
                hint="give target_modules a list, or name the layers in the expression",
            )

    def shared_settings(self, model: PreTrainedModel) -> dict[str, Any]:
        """With what is left out."""
        shared = super().shared_settings(model)
        if self.layers_to_transform is not None and self.target_modules == "all-linear":
            shared["target_modules"] = _linear_names(model)  # PEFT counts layers for a list alone
        return {**shared, "layers_to_transform": self.layers_to_transform}


class Selected(Layered):
    """A method of which modules and layers can be left out."""

    exclude_modules: Modules | None = None
    """Names, or one regular expression, of modules to leave out."""

    def shared_settings(self, model: PreTrainedModel) -> dict[str, Any]:
        """With what is left out."""
        return {**super().shared_settings(model), "exclude_modules": self.exclude_modules}


def save_adapter(model: PeftModel, folder: Path, **options: Any) -> None:
    """Write an adapter in PEFT's own format; `options` as of PEFT's `save_pretrained`."""
    # "auto" would ask the hub whether the base's vocabulary has grown.
    model.save_pretrained(folder, save_embedding_layers=False, **options)
    # PEFT's form for a model card, with its questions unanswered.
    (folder / "README.md").unlink()


def put_on(model: PreTrainedModel, config: PeftConfig) -> PeftModel:
    """PEFT's layers in the places that a config names, what is trained in float32."""
    return trained_in_float32(adapt(model, config))


def adapt(model: PreTrainedModel, config: PeftConfig, adapter_name: str = "default") -> PeftModel:
    """PEFT around a base model, in our form: LoRA's layers, and where virtual tokens come in.

    Raises:
        ValueError: PEFT refuses the settings, or it is a kind of virtual tokens that is not known.
    """
    from peft import PeftModel, get_peft_model

    from qlora_cli.adapters.layers.virtual_tokens import insert_virtual_tokens

    if not config.is_prompt_learning:
        use_our_layers(config, model)
        return get_peft_model(model, config, adapter_name=adapter_name)
    # PEFT's class for causal models would put them in too.
    adapted = PeftModel(model, config, adapter_name)
    insert_virtual_tokens(adapted)
    return adapted


def use_our_layers(config: Any, model: nn.Module) -> None:
    """Let PEFT make our layers of LoRA; what is derived from its config has layers of its own."""
    from qlora_cli.kernels.peft_lora_layers import layer_classes

    if config.peft_type == "LORA":
        config._register_custom_module(layer_classes(model))


def trained_in_float32(model: PeftModel) -> PeftModel:
    """Bfloat16 loses updates below its grid."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


# The three ways in which PEFT holds a name of its config against a module's name.
def is_suffix(wanted: str, module: str) -> bool:
    """A name in a list."""
    return module == wanted or module.endswith(f".{wanted}")


def is_full_match(wanted: str, module: str) -> bool:
    """A regular expression instead of a list."""
    return re.fullmatch(wanted, module) is not None


def is_pattern(wanted: str, module: str) -> bool:
    """A key of a mapping."""
    return re.match(rf"(.*\.)?({wanted})$", module) is not None


def is_expression(value: Modules | None) -> bool:
    """Whether a setting of names is one regular expression."""
    return isinstance(value, str) and value != "all-linear"


def require_modules(key: str, value: Modules | None, modules: list[str]) -> None:
    """Raises ModelError if a setting of names, or one regular expression, matches no module."""
    if isinstance(value, list):
        require_each(f"adapter.{key}", value, modules, is_suffix)
    elif isinstance(value, str) and is_expression(value):
        require_each(f"adapter.{key}", [value], modules, is_full_match)


def require_each(
    key: str, wanted: Iterable[str], modules: list[str], matches: Callable[[str, str], bool]
) -> None:
    """Raises ModelError, with near names, if one of `wanted` matches none of `modules`."""
    leaves = sorted({name.rpartition(".")[2] for name in modules})
    for name in wanted:
        try:
            found = any(matches(name, module) for module in modules)
        except re.error as error:
            raise ModelError(f"{key}: {name!r} is no regular expression: {error}") from error
        if not found:
            near = difflib.get_close_matches(name, leaves, n=3)
            raise ModelError(
                f"{key}: {name!r} matches no module of the model, which has {', '.join(leaves)}",
                hint=f"did you mean {' or '.join(near)}?" if near else None,
            )


def _linear_names(model: PreTrainedModel) -> list[str]:
    """The last parts of the names of linear layers, the head aside: what `all-linear` means."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    return sorted(
        {
            name.rpartition(".")[2]
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear | Conv1D) and module is not head
        }
    )


def _leaves(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if not list(module.children())]
