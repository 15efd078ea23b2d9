"""Training methods. To add one: a class in a file of this folder, and its name in the union."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from qlora_cli.adapters.adalora import AdaLoRA
from qlora_cli.adapters.bottleneck import Bottleneck
from qlora_cli.adapters.full import FullFineTune
from qlora_cli.adapters.lora import LoRA
from qlora_cli.adapters.other_peft import HRA, IA3, OFT, LoHa, LoKr, OtherPeft, VeRA
from qlora_cli.adapters.partial import BitFit, Freeze
from qlora_cli.adapters.virtual_tokens import PrefixTuning, PromptTuning

AdapterConfig = Annotated[
    LoRA
    | AdaLoRA
    | FullFineTune
    | Freeze
    | BitFit
    | IA3
    | VeRA
    | LoHa
    | LoKr
    | OFT
    | HRA
    | Bottleneck
    | PromptTuning
    | PrefixTuning
    | OtherPeft,
    Field(discriminator="type"),
]

__all__ = [
    "HRA",
    "IA3",
    "OFT",
    "AdaLoRA",
    "AdapterConfig",
    "BitFit",
    "Bottleneck",
    "Freeze",
    "FullFineTune",
    "LoHa",
    "LoKr",
    "LoRA",
    "OtherPeft",
    "PrefixTuning",
    "PromptTuning",
    "VeRA",
]
