"""Bottleneck adapters."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from qlora_cli.adapters.base import AdapterMethod
from qlora_cli.adapters.targets import (
    ExcludeModules,
    LayersToTransform,
    ModulesToSave,
    SomeModules,
    check_layers,
    check_targets,
    target_settings,
)
from qlora_cli.errors import ModelError

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel

_LAST_LINEAR = {
    "attention": r".*(attn|attention)\.(o_proj|out_proj|c_proj|dense|wo)",
    "feed_forward": r".*((mlp|ffn|feed_forward)\.(down_proj|c_proj|dense_4h_to_h|w2|fc2)|\d+\.fc2)",
}
"""The last linear layer of each half of a decoder layer, as transformers names it."""


class Bottleneck(AdapterMethod):
    """A small network with a narrow middle after attention and feed-forward (Houlsby et al. 2019,
    https://arxiv.org/abs/1902.00751), or after feed-forward only (Pfeiffer et al. 2020,
    https://arxiv.org/abs/2005.00247)."""

    no_merge: ClassVar[str] = "weights of the base cannot express its non-linearity"
    checks = (check_targets, check_layers)
    type: Literal["bottleneck"] = "bottleneck"
    target_modules: SomeModules = None
    """Layers whose output goes through an adapter: a list of names, or one regular expression;
    null takes the last linear layer of each half that `after` names."""
    modules_to_save: ModulesToSave = Field([])
    layers_to_transform: LayersToTransform = None
    exclude_modules: ExcludeModules = None
    size: int = Field(64, ge=1)
    """Width of the middle."""
    activation: Literal["gelu", "relu", "silu"] = "gelu"
    """The non-linearity in the middle."""
    after: list[Literal["attention", "feed_forward"]] = Field(
        ["attention", "feed_forward"], min_length=1
    )
    """Halves of a decoder layer that are followed by an adapter; `[feed_forward]` is the lighter
    form."""

    def peft_config(self, model: PreTrainedModel) -> PeftConfig:
        """Return the settings as PEFT's config for `model`."""
        from qlora_cli.adapters.layers.bottleneck import BottleneckConfig, register

        register()
        settings = target_settings(self, model)
        if self.target_modules is None:
            settings["target_modules"] = self._default_targets(model)
        return BottleneckConfig(size=self.size, activation=self.activation, **settings)

    def _default_targets(self, model: PreTrainedModel) -> list[str]:
        found: set[str] = set()
        for half in self.after:
            names = [n for n, _ in model.named_modules() if re.fullmatch(_LAST_LINEAR[half], n)]
            if not names:
                raise ModelError(
                    f"adapter.after: this model has no {half} whose last layer has a known name",
                    hint="name the layers in adapter.target_modules",
                )
            # Keep two parts of a name: GPT-2 has a c_proj in both halves.
            found |= {".".join(name.split(".")[-2:]) for name in names if ".fc2" not in name}
            found |= {"fc2" for name in names if name.endswith(".fc2")}
        return sorted(found)
