"""LoRA and its variants."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from qlora_cli.adapters.base import AdapterMethod
from qlora_cli.adapters.peft_base import save_adapter
from qlora_cli.adapters.targets import (
    ExcludeModules,
    LayersToTransform,
    ModulesToSave,
    TargetModules,
    check_layers,
    check_targets,
    check_tied_targets,
    is_pattern,
    is_suffix,
    leaf_modules,
    require_each,
    target_settings,
)
from qlora_cli.common.config import UserPath
from qlora_cli.errors import ModelError

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel

_PEFT_INITS = {"default": True, "gaussian": "gaussian"}
"""Initializations by PEFT, all with an update of zero -> their names there."""

_FAST_STEPS = 16
"""Steps of the subspace iteration (Halko et al. 2011, https://arxiv.org/abs/0909.4061)."""

_UNSUPPORTED_INITS = {
    "loftq": "it needs the unquantized weights in addition to the quantized ones, and a method "
    "gets only the model as it was loaded",
    "eva": "it needs activations of the training data, and a method gets only the model",
}
"""Initializations of PEFT that are not supported -> why."""


def check_patterns(method: LoRA, model: PreTrainedModel) -> None:
    """Raise ModelError if a key of `rank_pattern` or `alpha_pattern` matches no module."""
    modules = leaf_modules(model)
    require_each("adapter.rank_pattern", method.rank_pattern, modules, is_pattern)
    require_each("adapter.alpha_pattern", method.alpha_pattern, modules, is_pattern)


def check_target_parameters(method: LoRA, model: PreTrainedModel) -> None:
    """Raise ModelError if `target_parameters` matches nothing, or PEFT would ignore
    `layers_to_transform` for it."""
    parameters = [name for name, _ in model.named_parameters()]
    require_each("adapter.target_parameters", method.target_parameters, parameters, is_suffix)
    if method.target_parameters and method.layers_to_transform is not None:
        raise ModelError(
            "adapter.layers_to_transform: PEFT selects layers only for modules, and would update "
            "adapter.target_parameters in all layers",
            hint="name the layers in target_parameters: layers.0.mlp.experts.down_proj",
        )


def check_token_indices(method: LoRA, model: PreTrainedModel) -> None:
    """Raise ModelError if one of `trainable_token_indices` is beyond the vocabulary."""
    embedding: Any = model.get_input_embeddings()
    rows = embedding.weight.shape[0]
    if wrong := [token for token in method.trainable_token_indices if token >= rows]:
        raise ModelError(
            f"adapter.trainable_token_indices: the model has no token {wrong[0]}; its tokens are "
            f"0 to {rows - 1}"
        )


class LoRA(AdapterMethod):
    """Low-rank adaptation (Hu et al. 2021, https://arxiv.org/abs/2106.09685)."""

    checks = (
        check_targets,
        check_layers,
        check_tied_targets,
        check_patterns,
        check_target_parameters,
        check_token_indices,
    )
    type: Literal["lora"] = "lora"
    target_modules: TargetModules = "all-linear"
    modules_to_save: ModulesToSave = Field([])
    layers_to_transform: LayersToTransform = None
    exclude_modules: ExcludeModules = None
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
    """Train magnitude and direction separately (DoRA, https://arxiv.org/abs/2402.09353)."""
    target_parameters: list[str] = Field([])
    """Parameters with an update that are not the weight of a linear layer: stacks of experts, such
    as `experts.gate_up_proj`."""
    trainable_token_indices: list[Annotated[int, Field(ge=0)]] = Field([])
    """Tokens whose rows of the embedding are trained (of the head too, if it is tied)."""
    init: Literal["default", "gaussian", "pissa", "pissa_fast", "olora"] = "default"
    """Initial values of the factors. `default` and `gaussian` draw A and set B to zero. `pissa`
    takes the largest singular values of each weight (PiSSA, https://arxiv.org/abs/2404.02948);
    `pissa_fast` finds them in 16 steps, where the full decomposition of a large model would take
    minutes; `olora` takes the QR decomposition (OLoRA, https://arxiv.org/abs/2406.01775). With
    these three the initial update is subtracted again, so the saved adapter has rank 2 r."""
    freeze_a: bool = False
    """Freeze the factors A at their random values and train only B (LoRA-FA,
    https://arxiv.org/abs/2308.03303): half as many trained weights."""
    init_from: UserPath | None = Field(None, min_length=1)
    """Warm start: folder of a run (its last weights) or of an adapter whose weights a new run
    starts with. Its rank, alpha and targets must be the same."""

    @field_validator("init", mode="before")
    @classmethod
    def _refuse_unsupported(cls, value: object) -> object:
        if isinstance(value, str) and value in _UNSUPPORTED_INITS:
            raise ValueError(f"{value} is not supported: {_UNSUPPORTED_INITS[value]}; use default")
        return value

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.freeze_a and self.init_from:
            raise ValueError(
                "freeze_a does not work with init_from: a checkpoint holds only trained weights, "
                "so a resumed run would lack the factors A of the other adapter"
            )
        if self.init in _PEFT_INITS:
            return self
        conflicts = {
            "use_dora": "DoRA takes the norms of the initial weights",
            "freeze_a": "A would have to keep its random values",
            "init_from": "both set the initial weights",
            "target_parameters": "PEFT updates stacks of experts in another form",
        }
        for name, why in conflicts.items():
            if getattr(self, name):
                raise ValueError(f"init ({self.init}) does not work with {name}: {why}")
        return self

    @property
    def saved_per_trained(self) -> int:
        """Approximate count of saved numbers for each trained one.

        Frozen factors and the initial values of factors are saved in addition.
        """
        return 2 if self.freeze_a or self.init not in _PEFT_INITS else 1

    def peft_config(self, model: PreTrainedModel) -> PeftConfig:
        """Return the settings as PEFT's config for `model`."""
        from peft import LoraConfig

        # Subtracting the initial update doubles the rank, at an unchanged scale.
        ranks = 1 if self.init in _PEFT_INITS else 2
        alphas = math.sqrt(ranks) if self.use_rslora else ranks
        return LoraConfig(
            r=ranks * self.r,
            lora_alpha=alphas * self.alpha,
            lora_dropout=self.dropout,
            rank_pattern={name: ranks * r for name, r in self.rank_pattern.items()},
            alpha_pattern={name: alphas * alpha for name, alpha in self.alpha_pattern.items()},
            init_lora_weights=_PEFT_INITS.get(self.init, True),
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
            target_parameters=self.target_parameters or None,
            trainable_token_indices=self.trainable_token_indices or None,
            **target_settings(self, model),
        )

    def initialize(self, adapted: PeftModel) -> None:
        """Set the initial factors of PiSSA and OLoRA; freeze A if the recipe asks for it."""
        from qlora_cli.adapters.layers.lora_init import ADAPTER, linear_updates

        if self.init not in _PEFT_INITS:
            for name, layer in linear_updates(adapted, f"adapter.init ({self.init})").items():
                self._decompose(name, layer)
        if self.freeze_a:
            for layer in linear_updates(adapted, "adapter.freeze_a").values():
                layer.lora_A[ADAPTER].requires_grad_(False)

    def _decompose(self, name: str, layer: Any) -> None:
        """Initialize the factors of a layer from a decomposition of its base weight."""
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
                f"adapter.r ({rank}) is larger than the rank of {name} ({min(weight.shape)})",
                hint="give a smaller r, or give the module its own in adapter.rank_pattern",
            )
        if self.init == "olora":
            a, b = olora_factors(weight, rank)
        else:
            steps = _FAST_STEPS if self.init == "pissa_fast" else None
            a, b = pissa_factors(weight, rank, layer.scaling[ADAPTER], steps)
        set_factors(layer, a, b)

    def save(self, model: PeftModel, folder: Path) -> None:
        """Write the adapter as ordinary LoRA, in PEFT's format."""
        from qlora_cli.adapters.layers.lora_init import plain_lora_state

        save_adapter(model, folder, state_dict=plain_lora_state(model))
