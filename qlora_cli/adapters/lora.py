"""LoRA and its variants."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from qlora_cli.adapters.peft_base import (
    Selected,
    is_pattern,
    is_suffix,
    require_each,
    save_adapter,
)
from qlora_cli.errors import ModelError

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel


class LowRank(Selected):
    """A method whose update of each target is a product of two thin matrices."""

    def check(self, model: PreTrainedModel) -> None:
        """Raises ModelError if the settings and the model do not go together."""
        super().check(model)
        self._refuse_tied(model)

    def save(self, model: PeftModel, folder: Path) -> None:
        """Write the adapter as ordinary LoRA, in PEFT's format."""
        from qlora_cli.adapters.layers.lora_init import plain_lora_state

        save_adapter(model, folder, state_dict=plain_lora_state(model))

    def _refuse_tied(self, model: PreTrainedModel) -> None:
        """An update beside a matrix that two modules share would be merged into both of them."""
        if not model.config.tie_word_embeddings or not isinstance(self.target_modules, list):
            return
        tied = [model.get_input_embeddings(), model.get_output_embeddings()]
        for name, module in model.named_modules():
            is_target = any(is_suffix(target, name) for target in self.target_modules)
            if is_target and any(module is one for one in tied):
                raise ModelError(
                    f"adapter.target_modules: {name} shares its weights with the "
                    "embedding or the head of this model, so an update of one cannot be merged",
                    hint="adapter.modules_to_save trains them in full",
                )


_PLAIN = {"default": True, "gaussian": "gaussian"}
"""Ways to begin that are PEFT's own, with an update of zero -> what PEFT calls them."""

_FAST_STEPS = 16
"""Of a subspace iteration (Halko et al. 2011, https://arxiv.org/abs/0909.4061)."""

_NOT_HERE = {
    "loftq": "it needs the unquantized weights beside the quantized ones, and a method is given "
    "the model as it was loaded",
    "eva": "it needs activations of the training data, and a method is given the model alone",
}
"""Ways to begin that PEFT has -> why they are not taken."""


class LoRA(LowRank):
    """Low-rank adaptation (Hu et al. 2021, https://arxiv.org/abs/2106.09685)."""

    type: Literal["lora"] = "lora"
    r: int = Field(16, ge=1)
    """Rank of the update."""
    alpha: float = Field(32, gt=0)
    """The update is scaled by alpha / r (by alpha / sqrt(r) with `use_rslora`)."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the input of the update."""
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] = Field({})
    """Module name or regular expression -> its own rank."""
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = Field({})
    """Module name or regular expression -> its own alpha."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(r) (rsLoRA, https://arxiv.org/abs/2312.03732)."""
    use_dora: bool = False
    """Train magnitude and direction apart (DoRA, https://arxiv.org/abs/2402.09353)."""
    target_parameters: list[str] = Field([])
    """Tensors with an update that are no module's only weight, such as `experts.gate_up_proj`:
    stacks of experts."""
    trainable_token_indices: list[Annotated[int, Field(ge=0)]] = Field([])
    """Tokens whose rows of the embedding (of the head too, where it is tied) are trained."""
    init: Literal["default", "gaussian", "pissa", "pissa_fast", "olora"] = "default"
    """What the factors begin as. `default` and `gaussian` draw A and leave B at zero. `pissa`
    begins with the largest singular values of each weight (PiSSA,
    https://arxiv.org/abs/2404.02948); `pissa_fast` finds them in 16 steps, where decomposing the
    weights of a large model would take minutes; `olora` begins with their QR decomposition (OLoRA,
    https://arxiv.org/abs/2406.01775). What the factors began as is taken off again, and makes the
    saved adapter one of rank 2 r."""
    freeze_a: bool = False
    """Leave the factors A as they were drawn and train B alone (LoRA-FA,
    https://arxiv.org/abs/2308.03303): half as many trained weights."""
    init_from: str | None = Field(None, min_length=1)
    """Folder of a run (its last weights) or of an adapter whose weights a new run begins with; its
    rank, alpha and targets must be the same."""

    @field_validator("init", mode="before")
    @classmethod
    def _say_why_not(cls, value: object) -> object:
        if isinstance(value, str) and value in _NOT_HERE:
            raise ValueError(f"{value} is not here: {_NOT_HERE[value]}; use default")
        return value

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.freeze_a and self.init_from:
            raise ValueError(
                "freeze_a does not go with init_from: a checkpoint holds what is trained, and the "
                "factors A of another adapter would be missing where the run is resumed"
            )
        if self.init in _PLAIN:
            return self
        others = {
            "use_dora": "DoRA takes the norms of the weights that it begins with",
            "freeze_a": "A would have to stay as it is",
            "init_from": "it would begin as two things",
            "target_parameters": "PEFT updates stacks of experts in another form",
        }
        for name, why in others.items():
            if getattr(self, name):
                raise ValueError(f"init ({self.init}) does not go with {name}: {why}")
        return self

    @property
    def saved_per_trained(self) -> int:
        """Frozen factors are saved too, and what factors began as."""
        return 2 if self.freeze_a or self.init not in _PLAIN else 1

    def peft_config(self, model: PreTrainedModel) -> PeftConfig:
        """The settings in PEFT's own terms."""
        from peft import LoraConfig

        # What it began as is as much again beside it, in the same scale.
        ranks = 1 if self.init in _PLAIN else 2
        alphas = math.sqrt(ranks) if self.use_rslora else ranks
        return LoraConfig(
            r=ranks * self.r,
            lora_alpha=alphas * self.alpha,
            lora_dropout=self.dropout,
            rank_pattern={name: ranks * r for name, r in self.rank_pattern.items()},
            alpha_pattern={name: alphas * alpha for name, alpha in self.alpha_pattern.items()},
            init_lora_weights=_PLAIN.get(self.init, True),
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
            target_parameters=self.target_parameters or None,
            trainable_token_indices=self.trainable_token_indices or None,
            **self.shared_settings(model),
        )

    def check(self, model: PreTrainedModel) -> None:
        """Raises ModelError if the settings and the model do not go together."""
        super().check(model)
        modules = [name for name, module in model.named_modules() if not list(module.children())]
        require_each("adapter.rank_pattern", self.rank_pattern, modules, is_pattern)
        require_each("adapter.alpha_pattern", self.alpha_pattern, modules, is_pattern)
        parameters = [name for name, _ in model.named_parameters()]
        require_each("adapter.target_parameters", self.target_parameters, parameters, is_suffix)
        if self.target_parameters and self.layers_to_transform is not None:
            raise ModelError(
                "adapter.layers_to_transform: PEFT counts layers for modules alone, and "
                "adapter.target_parameters would be updated in all of them",
                hint="name the layers in target_parameters: layers.0.mlp.experts.down_proj",
            )
        embedding: Any = model.get_input_embeddings()
        rows = embedding.weight.shape[0]
        if wrong := [token for token in self.trainable_token_indices if token >= rows]:
            raise ModelError(
                f"adapter.trainable_token_indices: there is no token {wrong[0]}; the model has "
                f"0 to {rows - 1}"
            )

    def initialize(self, adapted: PeftModel) -> None:
        """Give the factors what they begin as, where that is not PEFT's; freeze A."""
        from qlora_cli.adapters.layers.lora_init import ADAPTER

        if self.init not in _PLAIN:
            for name, layer in linear_updates(adapted, f"adapter.init ({self.init})").items():
                self._continue(name, layer)
        if self.freeze_a:
            for layer in linear_updates(adapted, "adapter.freeze_a").values():
                layer.lora_A[ADAPTER].requires_grad_(False)

    def _continue(self, name: str, layer: Any) -> None:
        """Begin with a part of the layer's own weight."""
        from qlora_cli.adapters.layers.lora_init import (
            ADAPTER,
            dequantized_base_weight,
            olora_factors,
            pissa_factors,
            set_factors,
        )

        weight, rank = dequantized_base_weight(layer), layer.r[ADAPTER] // 2
        if rank > min(weight.shape):
            raise ModelError(
                f"adapter.r ({rank}) is more than {name} has: {min(weight.shape)}",
                hint="give a smaller r, or the module one of its own in adapter.rank_pattern",
            )
        if self.init == "olora":
            a, b = olora_factors(weight, rank)
        else:
            steps = _FAST_STEPS if self.init == "pissa_fast" else None
            a, b = pissa_factors(weight, rank, layer.scaling[ADAPTER], steps)
        set_factors(layer, a, b)

    def load_weights_from(self, model: PeftModel, folder: Path) -> None:
        """Put the weights of a saved adapter in place of those that `attach` began with.

        Raises:
            ModelError: it was trained with other settings, or does not fit tensor for tensor.
        """
        from peft import get_peft_model_state_dict, set_peft_model_state_dict

        from qlora_cli.adapters.files import read_adapter
        from qlora_cli.adapters.weight_edits import match_saved, refuse_changed_base

        config, saved = read_adapter(folder)
        refuse_changed_base(config, folder)
        live = get_peft_model_state_dict(model, save_embedding_layers=False)
        _refuse_other_settings(config, model.peft_config["default"], saved, live, folder)
        own = {id(parameter) for parameter in model.parameters() if not parameter.requires_grad}
        match_saved(model, {name: tuple(t.shape) for name, t in saved.items()}, own, folder)
        if bad := [name for name, tensor in saved.items() if not tensor.isfinite().all()]:
            raise ModelError(f"{folder}: {len(bad)} tensors are not finite (such as {bad[0]})")
        set_peft_model_state_dict(model, saved)


_AGREED = {
    "peft_type": "type",
    "r": "r",
    "lora_alpha": "alpha",
    "rank_pattern": "rank_pattern",
    "alpha_pattern": "alpha_pattern",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
    "modules_to_save": "modules_to_save",
}
"""What of PEFT's config has to be the same for weights to mean the same, by our names."""


def _refuse_other_settings(
    config: PeftConfig, live: PeftConfig, saved: Iterable[str], wanted: Iterable[str], folder: Path
) -> None:
    """
    Args:
        saved: names of the tensors of the adapter in `folder`, whose config is `config`.
        wanted: names of the tensors that it is to be put into.
    """
    pairs = {
        ours: [getattr(one, name, None) for one in (config, live)] for name, ours in _AGREED.items()
    }
    # By what they matched: a list, a pattern and `all-linear` may come to the same.
    pairs["target_modules"] = [_targets(names) for names in (saved, wanted)]
    lines = [
        f"adapter.{key}: {old} -> {new}"
        for key, (old, new) in pairs.items()
        if (old or None) != (new or None)
    ]
    if lines:
        raise ModelError(
            "\n".join([f"adapter.init_from: {folder} was trained with other settings", *lines]),
            hint="its weights mean something with its own settings alone; give the recipe the same",
        )


def linear_updates(adapted: PeftModel, what: str) -> dict[str, Any]:
    """PEFT's layers with an update, by their names in the base.

    Raises:
        ModelError: one is no update of a linear layer, which `what` needs.
    """
    from qlora_cli.adapters.layers.lora_init import low_rank_layers

    layers = dict(low_rank_layers(adapted))
    for parameter, _ in adapted.named_parameters():
        name = parameter.partition(".lora_")[0].removeprefix("base_model.model.")
        if ".lora_" in parameter and name not in layers:
            raise ModelError(
                f"{what} is for linear layers, and {name} is none",
                hint="leave it out of adapter.target_modules; adapter.modules_to_save trains it",
            )
    return layers


def _targets(names: Iterable[str]) -> str:
    """The kinds of modules that have an update, and how many of each."""
    updated = {name.partition(".lora_")[0] for name in names if ".lora_" in name}
    kinds = Counter(name.rpartition(".")[2] for name in updated)
    return ", ".join(f"{number} {kind}" for kind, number in sorted(kinds.items()))
