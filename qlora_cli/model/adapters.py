"""What is trained."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from qlora_cli.part import Part


class FullFineTune(Part):
    """Every weight is trained."""

    type: Literal["full"] = "full"


class LoRA(Part):
    """Low-rank adaptation (Hu et al. 2021, https://arxiv.org/abs/2106.09685)."""

    type: Literal["lora"] = "lora"
    r: int = Field(16, ge=1)
    """Rank of the update."""
    alpha: float = Field(32, gt=0)
    """The update is scaled by alpha / r (by alpha / sqrt(r) with `use_rslora`)."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the input of the update."""
    target_modules: Literal["all-linear"] | list[str] | str = "all-linear"
    """`all-linear` (all but the head), a list of module names, or one regular expression."""
    exclude_modules: list[str] | str | None = None
    """Names, or one regular expression, of modules to leave out."""
    modules_to_save: list[str] = []
    """Modules trained in full and saved with the adapter, such as `lm_head`."""
    rank_pattern: dict[str, int] = {}
    """Module name or regular expression -> its own rank."""
    alpha_pattern: dict[str, float] = {}
    """Module name or regular expression -> its own alpha."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(r) (rsLoRA, https://arxiv.org/abs/2312.03732)."""
    use_dora: bool = False
    """Train magnitude and direction apart (DoRA, https://arxiv.org/abs/2402.09353)."""


AdapterConfig = Annotated[LoRA | FullFineTune, Field(discriminator="type")]
