"""The classic adapter."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from qlora_cli.adapters.peft_base import Modules, Selected
from qlora_cli.errors import ModelError

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel

_ENDS = {
    "attention": r".*(attn|attention)\.(o_proj|out_proj|c_proj|dense|wo)",
    "feed_forward": r".*((mlp|ffn|feed_forward)\.(down_proj|c_proj|dense_4h_to_h|w2|fc2)|\d+\.fc2)",
}
"""The last linear layer of each half of a decoder layer, as transformers names it."""


class Bottleneck(Selected):
    """A small network with a narrow middle after attention and feed-forward (Houlsby et al. 2019,
    https://arxiv.org/abs/1902.00751), or after feed-forward alone (Pfeiffer et al. 2020,
    https://arxiv.org/abs/2005.00247)."""

    type: Literal["bottleneck"] = "bottleneck"
    no_merge: ClassVar[str] = "its non-linearity is no weight of the base"
    size: int = Field(64, ge=1)
    """Width of the middle."""
    activation: Literal["gelu", "relu", "silu"] = "gelu"
    """The non-linearity in the middle."""
    after: list[Literal["attention", "feed_forward"]] = Field(
        ["attention", "feed_forward"], min_length=1
    )
    """Halves of a layer that an adapter comes after; `[feed_forward]` is the lighter form."""
    target_modules: Modules | None = None
    """The layers whose output goes through an adapter: a list of names, or one regular expression;
    null takes the last linear layer of each half that `after` names."""

    def peft_config(self, model: PreTrainedModel) -> PeftConfig:
        """The settings in PEFT's own terms."""
        from qlora_cli.adapters.layers.bottleneck import BottleneckConfig, register

        register()
        return BottleneckConfig(
            size=self.size,
            activation=self.activation,
            **{**self.shared_settings(model), "target_modules": self._targets(model)},
        )

    def _targets(self, model: PreTrainedModel) -> Modules:
        if self.target_modules is not None:
            modules: Modules = self.shared_settings(model)["target_modules"]
            return modules
        found: set[str] = set()
        for half in self.after:
            names = [n for n, _ in model.named_modules() if re.fullmatch(_ENDS[half], n)]
            if not names:
                raise ModelError(
                    f"adapter.after: this model has no {half} whose last layer has a known name",
                    hint="name the layers in adapter.target_modules",
                )
            # Two parts, since GPT-2 has a c_proj in both halves.
            found |= {".".join(name.split(".")[-2:]) for name in names if ".fc2" not in name}
            found |= {"fc2" for name in names if name.endswith(".fc2")}
        return sorted(found)
