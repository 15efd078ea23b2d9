"""Methods of PEFT that are no LoRA: one class each."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from qlora_cli.adapters.peft_base import Layered, Modules, PeftMethod, Selected
from qlora_cli.errors import ModelError

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel


_FOUR_BIT = dict.fromkeys(
    ("nf4", "fp4"), "PEFT takes the shape of the packed weight for that of the update"
)


class IA3(PeftMethod):
    """Keys, values and inner activations are each multiplied by a vector, one at first (Liu et al.
    2022, https://arxiv.org/abs/2205.05638)."""

    type: Literal["ia3"] = "ia3"
    exclude_modules: Modules | None = None
    """Names, or one regular expression, of modules to leave out."""
    feedforward_modules: Modules | None = None
    """Those of the targets whose input is multiplied, and not their output; null takes those that
    PEFT names for this kind of model."""

    def peft_config(self, model: PreTrainedModel) -> PeftConfig:
        """The settings in PEFT's own terms."""
        from peft import IA3Config

        return IA3Config(
            exclude_modules=self.exclude_modules,
            feedforward_modules=self.feedforward_modules,
            **self.shared_settings(model),
        )


class VeRA(Layered):
    """One pair of random, frozen factors for all layers, and two trained vectors for each (Kopiczko
    et al. 2023, https://arxiv.org/abs/2310.11454)."""

    type: Literal["vera"] = "vera"
    r: int = Field(256, ge=1)
    """Rank of the random factors."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the input of the update."""

    def peft_config(self, model: PreTrainedModel) -> PeftConfig:
        """The settings in PEFT's own terms. The random factors are saved: they depend on torch."""
        from peft import VeraConfig

        return VeraConfig(
            r=self.r,
            vera_dropout=self.dropout,
            save_projection=True,
            **self.shared_settings(model),
        )


class LoHa(Selected):
    """The update is the element-wise product of two low-rank ones (FedPara, Hyeon-Woo et al. 2021,
    https://arxiv.org/abs/2108.06098)."""

    type: Literal["loha"] = "loha"
    no_quantization: ClassVar[Mapping[str, str]] = _FOUR_BIT
    r: int = Field(8, ge=1)
    """Rank of each factor: that of the product is up to r * r."""
    alpha: float = Field(16, gt=0)
    """The update is scaled by alpha / r."""

    def peft_config(self, model: PreTrainedModel) -> PeftConfig:
        """The settings in PEFT's own terms."""
        from peft import LoHaConfig

        return LoHaConfig(r=self.r, alpha=self.alpha, **self.shared_settings(model))


class LoKr(Selected):
    """The update is a Kronecker product, one of its factors of low rank (KronA, Edalati et al.
    2022, https://arxiv.org/abs/2212.10650; LyCORIS, https://arxiv.org/abs/2309.14859)."""

    type: Literal["lokr"] = "lokr"
    no_quantization: ClassVar[Mapping[str, str]] = _FOUR_BIT
    r: int = Field(8, ge=1)
    """Rank of the factor."""
    alpha: float = Field(16, gt=0)
    """The update is scaled by alpha / r."""
    decompose_both: bool = False
    """Make the smaller factor one of low rank too."""
    decompose_factor: int = Field(-1, ge=-1)
    """Size of the smaller factor; -1 takes the one next to the square root of the width."""

    def peft_config(self, model: PreTrainedModel) -> PeftConfig:
        """The settings in PEFT's own terms."""
        from peft import LoKrConfig

        return LoKrConfig(
            r=self.r,
            alpha=self.alpha,
            decompose_both=self.decompose_both,
            decompose_factor=self.decompose_factor,
            **self.shared_settings(model),
        )


class OFT(Selected):
    """The input of each target is turned by an orthogonal matrix of blocks (Qiu et al. 2023,
    https://arxiv.org/abs/2306.07280; Liu et al. 2023, https://arxiv.org/abs/2311.06243)."""

    type: Literal["oft"] = "oft"
    oft_block_size: int = Field(32, ge=2)
    """Inputs that are turned together. PEFT takes the nearest size that divides the width."""

    def peft_config(self, model: PreTrainedModel) -> PeftConfig:
        """The settings in PEFT's own terms."""
        from peft import OFTConfig

        return OFTConfig(oft_block_size=self.oft_block_size, **self.shared_settings(model))


class OtherPeft(PeftMethod):
    """A method of PEFT that has no class here, with PEFT's own settings."""

    type: Literal["peft"] = "peft"
    peft_type: Literal["randlora", "fourierft", "miss", "road"]
    """Which one: those that are held to what all methods are held to, by test."""
    config: dict[str, bool | int | float | str | list[int] | list[str]] = Field({})
    """Settings of PEFT's class for it, by their names there."""

    def peft_config(self, model: PreTrainedModel) -> PeftConfig:
        """The settings in PEFT's own terms.

        Raises:
            ModelError: PEFT's class has no setting of a name.
        """
        from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftType

        kind = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(self.peft_type.upper())]
        shared = self.shared_settings(model)
        ours = {*shared, "peft_type", "auto_mapping", "base_model_name_or_path", "revision"}
        known = {field.name for field in dataclasses.fields(kind)} - ours
        for name in self.config:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=3)
                raise ModelError(
                    f"adapter.config: PEFT's {kind.__name__} has no {name!r} to be set here; it "
                    f"takes {', '.join(sorted(known))}",
                    hint=f"did you mean {' or '.join(near)}?" if near else None,
                )
        return kind(**shared, **self.config)
