"""Virtual tokens before each row, and nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from qlora_cli.adapters.peft_base import OfPeft
from qlora_cli.models.heads import CAUSAL_LM

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel


class _VirtualTokens(OfPeft):
    no_merge: ClassVar[str] = "virtual tokens are no weight of the base"
    no_packing: ClassVar[str] = "each example needs virtual tokens of its own before it"
    first_change: ClassVar[str] = "It begins as if words drawn at random stood before each row."
    num_virtual_tokens: int = Field(20, ge=1)
    """How many stand before each row. The context has room for so many tokens less."""

    def _settings(self) -> dict[str, Any]:
        return {"task_type": CAUSAL_LM.task_type, "num_virtual_tokens": self.num_virtual_tokens}


class PromptTuning(_VirtualTokens):
    """Embeddings of virtual tokens are trained (prompt tuning, Lester et al. 2021,
    https://arxiv.org/abs/2104.08691)."""

    type: Literal["prompt"] = "prompt"

    def peft_config(self, model: PreTrainedModel) -> PeftConfig:
        """The settings in PEFT's own terms."""
        from peft import PromptTuningConfig

        return PromptTuningConfig(prompt_tuning_init="SAMPLE_VOCAB", **self._settings())


class PrefixTuning(_VirtualTokens):
    """Keys and values of virtual tokens are trained, in every layer (prefix tuning, Li & Liang
    2021, https://arxiv.org/abs/2101.00190)."""

    type: Literal["prefix"] = "prefix"

    def peft_config(self, model: PreTrainedModel) -> PeftConfig:
        """The settings in PEFT's own terms."""
        from peft import PrefixTuningConfig

        return PrefixTuningConfig(**self._settings())

    def initialize(self, adapted: PeftModel) -> None:
        """With the keys and values of words."""
        from qlora_cli.adapters.layers.virtual_tokens import initialize_from_words

        initialize_from_words(adapted)
