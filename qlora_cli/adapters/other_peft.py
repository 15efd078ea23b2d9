"""PEFT's other methods: one class each."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from qlora_cli.adapters.base import AdapterMethod
from qlora_cli.adapters.targets import (
    ExcludeModules,
    LayersToTransform,
    ModulesToSave,
    SomeModules,
    TargetModules,
    check_layers,
    check_targets,
    target_settings,
)
from qlora_cli.errors import ModelError

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel

_NO_4BIT = dict.fromkeys(
    ("nf4", "fp4"), "PEFT takes the shape of the packed weight for that of the update"
)


class IA3(AdapterMethod):
    """Keys, values and inner activations are each multiplied by a trained vector, initially one
    (Liu et al. 2022, https://arxiv.org/abs/2205.05638)."""

    checks = (check_targets,)
    type: Literal["ia3"] = "ia3"
    target_modules: TargetModules = None
    modules_to_save: ModulesToSave = Field([])
    exclude_modules: ExcludeModules = None
    feedforward_modules: SomeModules = None
    """Targets whose input is multiplied instead of their output; null takes PEFT's default for
    this kind of model."""

    def peft_config(self, model: PreTrainedModel) -> PeftConfig:
        """Return the settings as PEFT's config for `model`."""
        from peft import IA3Config

        return IA3Config(
            feedforward_modules=self.feedforward_modules, **target_settings(self, model)
        )


class VeRA(AdapterMethod):
    """One pair of random, frozen factors for all layers, and two trained vectors for each (Kopiczko
    et al. 2023, https://arxiv.org/abs/2310.11454)."""

    checks = (check_targets, check_layers)
    type: Literal["vera"] = "vera"
    target_modules: TargetModules = "all-linear"
    modules_to_save: ModulesToSave = Field([])
    layers_to_transform: LayersToTransform = None
    r: int = Field(256, ge=1)
    """Rank of the random factors."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the input of the update."""

    def peft_config(self, model: PreTrainedModel) -> PeftConfig:
        """Return the settings as PEFT's config for `model`."""
        from peft import VeraConfig

        return VeraConfig(
            r=self.r,
            vera_dropout=self.dropout,
            save_projection=True,  # the values of the random factors depend on torch's version
            **target_settings(self, model),
        )


class LoHa(AdapterMethod):
    """The update is the element-wise product of two low-rank ones (FedPara, Hyeon-Woo et al. 2021,
    https://arxiv.org/abs/2108.06098)."""

    no_quantization: ClassVar[Mapping[str, str]] = _NO_4BIT
    checks = (check_targets, check_layers)
    type: Literal["loha"] = "loha"
    target_modules: TargetModules = "all-linear"
    modules_to_save: ModulesToSave = Field([])
    layers_to_transform: LayersToTransform = None
    exclude_modules: ExcludeModules = None
    r: int = Field(8, ge=1)
    """Rank of each factor; that of the product is up to r * r."""
    alpha: float = Field(16, gt=0)
    """The update is scaled by alpha / r."""

    def peft_config(self, model: PreTrainedModel) -> PeftConfig:
        """Return the settings as PEFT's config for `model`."""
        from peft import LoHaConfig

        return LoHaConfig(r=self.r, alpha=self.alpha, **target_settings(self, model))


class LoKr(AdapterMethod):
    """The update is a Kronecker product with one low-rank factor (KronA, Edalati et al. 2022,
    https://arxiv.org/abs/2212.10650; LyCORIS, https://arxiv.org/abs/2309.14859)."""

    no_quantization: ClassVar[Mapping[str, str]] = _NO_4BIT
    checks = (check_targets, check_layers)
    type: Literal["lokr"] = "lokr"
    target_modules: TargetModules = "all-linear"
    modules_to_save: ModulesToSave = Field([])
    layers_to_transform: LayersToTransform = None
    exclude_modules: ExcludeModules = None
    r: int = Field(8, ge=1)
    """Rank of the low-rank factor."""
    alpha: float = Field(16, gt=0)
    """The update is scaled by alpha / r."""
    decompose_both: bool = False
    """Make the smaller factor low-rank too."""
    decompose_factor: int = Field(-1, ge=-1)
    """Size of the smaller factor; -1 takes the size closest to the square root of the width."""

    def peft_config(self, model: PreTrainedModel) -> PeftConfig:
        """Return the settings as PEFT's config for `model`."""
        from peft import LoKrConfig

        return LoKrConfig(
            r=self.r,
            alpha=self.alpha,
            decompose_both=self.decompose_both,
            decompose_factor=self.decompose_factor,
            **target_settings(self, model),
        )


class OFT(AdapterMethod):
    """The input of each target is rotated by an orthogonal block-diagonal matrix (Qiu et al. 2023,
    https://arxiv.org/abs/2306.07280; Liu et al. 2023, https://arxiv.org/abs/2311.06243)."""

    checks = (check_targets, check_layers)
    type: Literal["oft"] = "oft"
    target_modules: TargetModules = "all-linear"
    modules_to_save: ModulesToSave = Field([])
    layers_to_transform: LayersToTransform = None
    exclude_modules: ExcludeModules = None
    oft_block_size: int = Field(32, ge=2)
    """Inputs that are rotated together. PEFT takes the nearest size that divides the width."""

    def peft_config(self, model: PreTrainedModel) -> PeftConfig:
        """Return the settings as PEFT's config for `model`."""
        from peft import OFTConfig

        return OFTConfig(oft_block_size=self.oft_block_size, **target_settings(self, model))


class HRA(AdapterMethod):
    """The input of each target is reflected at `r` trained hyperplanes (Householder reflection
    adaptation, Yuan et al. 2024, https://arxiv.org/abs/2405.17484)."""

    no_quantization: ClassVar[Mapping[str, str]] = {
        **_NO_4BIT,
        "int8": "PEFT multiplies the stored integers, without their scales",
    }
    checks = (check_targets, check_layers)
    type: Literal["hra"] = "hra"
    target_modules: TargetModules = "all-linear"
    modules_to_save: ModulesToSave = Field([])
    layers_to_transform: LayersToTransform = None
    exclude_modules: ExcludeModules = None
    r: int = Field(8, ge=2)
    """Number of reflections; even, so that they cancel each other before the first step."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.r % 2:
            raise ValueError(
                f"r ({self.r}) has to be even: reflections cancel each other in pairs before the "
                "first step"
            )
        return self

    def peft_config(self, model: PreTrainedModel) -> PeftConfig:
        """Return the settings as PEFT's config for `model`."""
        from peft import HRAConfig

        return HRAConfig(r=self.r, **target_settings(self, model))


class OtherPeft(AdapterMethod):
    """A PEFT method without a class here, configured by PEFT's own settings."""

    checks = (check_targets,)
    type: Literal["peft"] = "peft"
    target_modules: TargetModules = None
    modules_to_save: ModulesToSave = Field([])
    peft_type: Literal["randlora", "fourierft", "miss", "road"]
    """PEFT's name of the method. Only methods that pass the contract tests are listed."""
    config: dict[str, bool | int | float | str | list[int] | list[str]] = Field({})
    """Settings of PEFT's config class for it, by their names there."""

    def peft_config(self, model: PreTrainedModel) -> PeftConfig:
        """Return the settings as PEFT's config for `model`.

        Raises:
            ModelError: PEFT's class does not have one of the settings.
        """
        from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftType

        kind = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(self.peft_type.upper())]
        shared = target_settings(self, model)
        ours = {*shared, "peft_type", "auto_mapping", "base_model_name_or_path", "revision"}
        known = {field.name for field in dataclasses.fields(kind)} - ours
        for name in self.config:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=3)
                raise ModelError(
                    f"adapter.config: {name!r} is not a setting of PEFT's {kind.__name__} that can "
                    f"be given here; it takes {', '.join(sorted(known))}",
                    hint=f"did you mean {' or '.join(near)}?" if near else None,
                )
        return kind(**shared, **self.config)
