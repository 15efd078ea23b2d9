"""The base of all training methods."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from qlora_cli.adapters.peft_base import (
    add_adapter,
    incompatible_hint,
    load_adapter,
    peft_errors,
    save_adapter,
)
from qlora_cli.common.config import Config
from qlora_cli.errors import ModelError
from qlora_cli.types import StepHooks

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch import nn
    from transformers import PreTrainedModel

    from qlora_cli.adapters.weight_edits import WeightEdits
    from qlora_cli.models.weight_names import WeightNames

Check = Callable[[Any, "PreTrainedModel"], None]
"""Raise ModelError if the settings of a method and a model do not fit together."""


class AdapterMethod(Config):
    """A way to train a model.

    Most methods are PEFT's: a variant returns PEFT's config from `peft_config`, and what is here
    attaches, saves, loads and merges it. A method that trains the base's own weights overrides
    `attach`, `save`, `load` and `weight_edits`.
    """

    trains_base: ClassVar[bool] = False
    """The method trains weights of the base and saves them; it adds none."""
    trains_all: ClassVar[bool] = False
    """The method trains every weight of the base."""
    no_merge: ClassVar[str] = ""
    """Why the result cannot be merged into the base; empty if it can."""
    no_averaging: ClassVar[str] = ""
    """Why an optimizer that averages weights cannot train it; empty if one can."""
    no_packing: ClassVar[str] = ""
    """Why several examples cannot share a row; empty if they can."""
    no_head: ClassVar[str] = ""
    """Why no head that scores rows can be trained with it; empty if one can."""
    no_quantization: ClassVar[Mapping[str, str]] = {}
    """Quantization types that the method cannot train on -> why."""
    first_change: ClassVar[str] = ""
    """How the model differs from its base before the first step; empty if it does not."""
    checks: ClassVar[tuple[Check, ...]] = ()
    """Checks of the settings against the model, run in this order before `attach` changes it."""
    type: str

    @property
    def saved_per_trained(self) -> int:
        """Approximate count of saved numbers for each trained one."""
        return 1

    @property
    def virtual_tokens(self) -> int:
        """Virtual tokens before each row, which take positions of the model's context."""
        return 0

    def peft_config(self, model: PreTrainedModel) -> PeftConfig:
        """Return the settings as PEFT's config for `model`."""
        raise NotImplementedError

    def initialize(self, adapted: PeftModel) -> None:
        """Set the initial values of trained weights where PEFT's are not the method's."""

    def attach(self, model: PreTrainedModel) -> PeftModel:
        """Add the method's weights to `model`, which is changed in place.

        Trained weights are float32. Random ones are drawn from torch's global generator.

        Raises:
            ModelError: a name matches no module, or PEFT refuses the settings for this model.
        """
        for check in self.checks:
            check(self, model)
        with peft_errors("adapter: PEFT refuses it", incompatible_hint):
            config: Any = self.peft_config(model)
            adapted = add_adapter(model, config)
            self.initialize(adapted)
        # PEFT keeps names in sets, whose order differs between processes: without sorting, equal
        # runs would not write equal files.
        for key, value in vars(config).items():
            if isinstance(value, set):
                setattr(config, key, sorted(value))
        return adapted

    def save(self, model: PeftModel, folder: Path) -> None:
        """Write the trained weights and their settings into `folder`, in PEFT's format."""
        save_adapter(model, folder)

    def load(self, model: PreTrainedModel, folder: Path) -> PeftModel:
        """Add a saved adapter (of any PEFT type) to its base model; its weights stay trainable.

        Raises:
            ModelError: the adapter does not fit the model tensor for tensor.
        """
        return load_adapter(model, folder)

    def weight_edits(
        self, skeleton: PreTrainedModel, names: WeightNames, folder: Path
    ) -> WeightEdits:
        """Return the changes that a merge of the saved adapter makes to the base's weights.

        Args:
            skeleton: the base on the meta device. It is changed.
            names: names of the weights in the model and in the base's files.
            folder: holds what `save` wrote.

        Raises:
            ModelError: the adapter cannot be merged, or does not fit the base.
        """
        from qlora_cli.adapters.peft_edits import PeftEdits

        if self.no_merge:
            raise ModelError(f"adapter.type ({self.type}) cannot be merged: {self.no_merge}")
        return PeftEdits(skeleton, names, folder)

    def step_hooks(self, model: nn.Module, max_steps: int) -> StepHooks:
        """Return what the method does in each step in addition to the optimizer (here: nothing).

        Args:
            model: the result of `attach`.
            max_steps: optimizer steps of the run.
        """
        return StepHooks()
