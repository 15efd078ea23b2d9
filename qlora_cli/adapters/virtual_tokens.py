"""Methods that train virtual tokens before each row."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from qlora_cli.adapters.base import AdapterMethod
from qlora_cli.models.heads import task_type

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel

_NO_MERGE = "virtual tokens are not a weight of the base"
_NO_PACKING = "each example needs its own virtual tokens before it"
_NO_HEAD = "PEFT does not train or save a head beside virtual tokens"
_FIRST_CHANGE = "Initially it acts as if random words stood before each row."

NumVirtualTokens = Annotated[
    int,
    Field(
        ge=1,
        description="Virtual tokens before each row. They take this many tokens of the context.",
    ),
]


class PromptTuning(AdapterMethod):
    """Embeddings of virtual tokens are trained (prompt tuning, Lester et al. 2021,
    https://arxiv.org/abs/2104.08691)."""

    no_merge: ClassVar[str] = _NO_MERGE
    no_packing: ClassVar[str] = _NO_PACKING
    no_head: ClassVar[str] = _NO_HEAD
    first_change: ClassVar[str] = _FIRST_CHANGE
    type: Literal["prompt"] = "prompt"
    num_virtual_tokens: NumVirtualTokens = 20

    @property
    def virtual_tokens(self) -> int:
        """Virtual tokens before each row, which take positions of the model's context."""
        return self.num_virtual_tokens

    def peft_config(self, model: PreTrainedModel) -> PeftConfig:
        """Return the settings as PEFT's config for `model`."""
        from peft import PromptTuningConfig

        return PromptTuningConfig(
            task_type=task_type(model),
            num_virtual_tokens=self.num_virtual_tokens,
            prompt_tuning_init="SAMPLE_VOCAB",
        )


class PrefixTuning(AdapterMethod):
    """Keys and values of virtual tokens are trained, in every layer (prefix tuning, Li & Liang
    2021, https://arxiv.org/abs/2101.00190)."""

    no_merge: ClassVar[str] = _NO_MERGE
    no_packing: ClassVar[str] = _NO_PACKING
    no_head: ClassVar[str] = _NO_HEAD
    first_change: ClassVar[str] = _FIRST_CHANGE
    type: Literal["prefix"] = "prefix"
    num_virtual_tokens: NumVirtualTokens = 20

    @property
    def virtual_tokens(self) -> int:
        """Virtual tokens before each row, which take positions of the model's context."""
        return self.num_virtual_tokens

    def peft_config(self, model: PreTrainedModel) -> PeftConfig:
        """Return the settings as PEFT's config for `model`."""
        from peft import PrefixTuningConfig

        return PrefixTuningConfig(
            task_type=task_type(model), num_virtual_tokens=self.num_virtual_tokens
        )

    def initialize(self, adapted: PeftModel) -> None:
        """Start with the keys and values of random words."""
        from qlora_cli.adapters.layers.virtual_tokens import initialize_from_words

        initialize_from_words(adapted)
