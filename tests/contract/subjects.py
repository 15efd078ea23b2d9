"""The subjects of the contract: each method, with each option that changes its mathematics."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from qlora_cli.adapters import (
    HRA,
    IA3,
    OFT,
    AdaLoRA,
    AdapterConfig,
    BitFit,
    Bottleneck,
    Freeze,
    FullFineTune,
    LoHa,
    LoKr,
    LoRA,
    OtherPeft,
    PrefixTuning,
    PromptTuning,
    VeRA,
)

CLASSES: tuple[Any, ...] = get_args(get_args(AdapterConfig)[0])
"""All classes of the union."""

BASES: dict[str, dict[str, Any]] = {
    "llama": {},
    "biased": {"attention_bias": True, "mlp_bias": True},
    "mixtral": {"family": "Mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3-moe": {
        "family": "Qwen3Moe", "num_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 16, "head_dim": 8,
    },
    "gpt-oss": {
        "family": "GptOss", "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8,
    },
}  # fmt: skip
"""Tiny models, as changes to the default one."""


@dataclass(frozen=True)
class Subject:
    """A method with its settings, and the tiny model it is tested on."""

    adapter: Any
    base: str = "llama"


def _peft(peft_type: Any, **config: Any) -> Subject:
    targets = ["q_proj", "down_proj"]
    return Subject(OtherPeft(peft_type=peft_type, target_modules=targets, config=config))


def _experts() -> LoRA:
    """Return a LoRA of two stacks of expert matrices, each one parameter of three dimensions."""
    stacks = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    return LoRA(r=4, target_modules=["q_proj"], target_parameters=stacks)


# Settings small enough for the tiny model. A class that is missing here gets its defaults.
_LISTED = {
    "full": Subject(FullFineTune()),
    "lora": Subject(LoRA(r=4)),
    "lora, by a pattern": Subject(LoRA(r=4, target_modules=r".*self_attn\.(q|v)_proj")),
    "lora, some excluded": Subject(LoRA(r=4, exclude_modules=["down_proj"])),
    "lora, rank and alpha by pattern": Subject(
        LoRA(r=4, rank_pattern={"q_proj": 2}, alpha_pattern={"layers.1.mlp.up_proj": 5})
    ),
    "lora, one layer": Subject(LoRA(r=4, layers_to_transform=[1])),
    "lora and the head": Subject(LoRA(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])),
    "lora and some tokens": Subject(
        LoRA(r=4, target_modules=["q_proj"], trainable_token_indices=[3, 5])
    ),
    "lora, init pissa": Subject(LoRA(r=4, init="pissa", rank_pattern={"q_proj": 2})),
    "lora, init olora": Subject(LoRA(r=4, init="olora", alpha_pattern={"q_proj": 2})),
    "lora, experts of Mixtral": Subject(_experts(), "mixtral"),
    "lora, experts of Qwen3-MoE": Subject(_experts(), "qwen3-moe"),
    "lora, experts of GPT-OSS": Subject(_experts(), "gpt-oss"),
    # A large alpha: two steps change little, and a merge into 16 bit refuses updates that vanish.
    "adalora": Subject(AdaLoRA(r=4, target_r=2, alpha=2000)),
    "freeze": Subject(Freeze(last_layers=1, patterns=["norm", "lm_head"])),
    "freeze, norms only": Subject(Freeze(last_layers=0, patterns=["norm"])),
    "bitfit": Subject(BitFit(), "biased"),
    "ia3": Subject(IA3()),
    "vera": Subject(VeRA(r=8)),
    "loha": Subject(LoHa(r=4)),
    "lokr": Subject(LoKr(r=4, decompose_factor=4)),
    "oft": Subject(OFT(oft_block_size=8)),
    "hra": Subject(HRA(r=4)),
    "bottleneck": Subject(Bottleneck(size=4)),
    "bottleneck, feed-forward only": Subject(Bottleneck(size=4, after=["feed_forward"])),
    "prompt": Subject(PromptTuning(num_virtual_tokens=5)),
    "prefix": Subject(PrefixTuning(num_virtual_tokens=5)),
    "peft: randlora": _peft("randlora", r=4),
    "peft: fourierft": _peft("fourierft", n_frequency=16, init_weights=True),
    "peft: miss": _peft("miss", r=4),
    "peft: road": _peft("road", group_size=16),
}


def _choices(kind: Any) -> Iterator[tuple[str, Any]]:
    """Yield each option of a class that takes one of a few values, with each of these values."""
    for name, field in kind.model_fields.items():
        if field.annotation is bool:
            yield from ((name, value) for value in (False, True))
        elif get_origin(field.annotation) is Literal and name != "type":
            yield from ((name, value) for value in get_args(field.annotation))


def _subjects() -> Iterator[tuple[str, Subject]]:
    written = {type(one.adapter): one for one in reversed(_LISTED.values())}
    for kind in CLASSES:
        name = kind.model_fields["type"].default
        mine = {n: one for n, one in _LISTED.items() if type(one.adapter) is kind}
        first = written.get(kind) or Subject(kind())
        yield from mine.items() if mine else [(name, first)]
        for option, value in _choices(kind):
            tried = [getattr(one.adapter, option) for one in (*mine.values(), first)]
            if value not in tried:
                settings = {**first.adapter.model_dump(exclude_unset=True), option: value}
                label = f"{name}, {option}" + ("" if value is True else f" {value}".lower())
                yield label, Subject(kind(**settings), first.base)


SUBJECTS = dict(_subjects())
"""All subjects, by their names in the table."""


def select(names: list[str]) -> list[str]:
    """Return the subjects of these names or types, all of them without names.

    Raises:
        KeyError: a name selects nothing.
    """
    types = {name: subject.adapter.type for name, subject in SUBJECTS.items()}
    for name in names:
        if name not in types and name not in types.values():
            raise KeyError(f"{name!r} is not a method; the methods are {'; '.join(types)}")
    return [name for name, kind in types.items() if not names or name in names or kind in names]
