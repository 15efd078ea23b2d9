"""How the frozen base weights are held in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from qlora_cli.common.config import Config
from qlora_cli.errors import RecipeError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

DtypeName = Literal["auto", "bfloat16", "float16", "float32"]


def resolve_dtype(name: DtypeName, auto: torch.dtype) -> torch.dtype:
    """The torch dtype of a name; `auto` is the dtype that the step computes in."""
    import torch

    if name == "auto":
        return auto
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _beside(held: DtypeName, dtype: torch.dtype) -> torch.dtype:
    """What a step computes in: in 16 bit, if weights of 16 bit would meet float32 otherwise."""
    import torch

    return resolve_dtype(held, dtype) if dtype == torch.float32 else dtype


class _Quantized(Config):
    is_quantized: ClassVar[bool] = True
    kept_factor: ClassVar[float] = 1.0
    """What its products keep and take on their way, by what those of 16-bit weights do. For models
    that cannot be traced; see `benchmarks/plan_formula.md`."""
    held_share: ClassVar[float] = 0.0
    """Of what a layer keeps in 16 bit: what its products keep outside of autograd, where
    checkpointing does not reach it."""

    def restore(self, model: PreTrainedModel) -> PreTrainedModel:
        """The weights that the quantized ones stand for, in float32."""
        import torch

        model.dequantize(torch.float32)
        model.float()
        return model


class _FourBit(_Quantized):
    max_unquantized: ClassVar[float] = 0.2
    """Share of the linear weights that may stay in 16 bit; above it the run stops."""

    double_quant: bool = True
    """Quantize the block constants too: saves about 0.37 bits per weight (QLoRA, section 3)."""
    compute_dtype: DtypeName = "auto"
    """Dtype in which dequantized weights are multiplied; `auto` follows `training.precision`."""
    quant_storage: Literal["uint8", "bfloat16", "float16", "float32"] = "uint8"
    """Dtype of the tensors with the packed 4-bit values; sharded training needs a float one."""

    @property
    def held_in(self) -> tuple[str, DtypeName]:
        """The setting that says in which dtype unquantized weights are held, and its value."""
        return "compute_dtype", self.compute_dtype

    def compute_in(self, dtype: torch.dtype) -> torch.dtype:
        """What a step computes in, where `training.precision` comes to `dtype`."""
        return _beside(self.compute_dtype, dtype)

    def _load_options(self, quant_type: str, dtype: torch.dtype) -> dict[str, Any]:
        import torch
        from transformers import BitsAndBytesConfig

        compute_dtype = resolve_dtype(self.compute_dtype, dtype)
        if {compute_dtype, dtype} == {torch.bfloat16, torch.float16}:
            raise RecipeError(
                f"quantization.compute_dtype ({self.compute_dtype}) and training.precision (here "
                f"{str(dtype).removeprefix('torch.')}) are two kinds of 16 bit, which do not mix",
                hint="--set quantization.compute_dtype=auto",
            )
        return {
            # What stays unquantized (embeddings, norms, head) has the dtype that is computed in.
            "dtype": compute_dtype,
            "quantization_config": BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type=quant_type,
                bnb_4bit_use_double_quant=self.double_quant,
                bnb_4bit_compute_dtype=compute_dtype,
                bnb_4bit_quant_storage=self.quant_storage,
            ),
        }


class Nf4(_FourBit):
    """4-bit NormalFloat (QLoRA, Dettmers et al. 2023, https://arxiv.org/abs/2305.14314)."""

    type: Literal["nf4"] = "nf4"

    def load_options(self, dtype: torch.dtype) -> dict[str, Any]:
        """Keyword arguments for `from_pretrained`; `dtype` is what `auto` stands for."""
        return self._load_options("nf4", dtype)


class Fp4(_FourBit):
    """4-bit floating point, with the same blocks as NF4."""

    type: Literal["fp4"] = "fp4"

    def load_options(self, dtype: torch.dtype) -> dict[str, Any]:
        """Keyword arguments for `from_pretrained`; `dtype` is what `auto` stands for."""
        return self._load_options("fp4", dtype)


class Int8(_Quantized):
    """8-bit weights, outlier columns in 16 bit (LLM.int8, https://arxiv.org/abs/2208.07339)."""

    type: Literal["int8"] = "int8"
    max_unquantized: ClassVar[float] = 0.2
    kept_factor: ClassVar[float] = 1.7
    held_share: ClassVar[float] = 0.7
    outlier_threshold: float = Field(6.0, ge=0)
    """Activations above it are multiplied in 16 bit; 0 turns the outlier path off."""

    @property
    def held_in(self) -> tuple[str, DtypeName]:
        """There is no setting: unquantized weights are held in what is computed in."""
        return "", "auto"

    def compute_in(self, dtype: torch.dtype) -> torch.dtype:
        """What a step computes in, where `training.precision` comes to `dtype`."""
        return dtype

    def load_options(self, dtype: torch.dtype) -> dict[str, Any]:
        """Keyword arguments for `from_pretrained`; `dtype` is what the rest is held in."""
        from transformers import BitsAndBytesConfig

        return {
            "dtype": dtype,
            "quantization_config": BitsAndBytesConfig(
                load_in_8bit=True, llm_int8_threshold=self.outlier_threshold
            ),
        }


class Unquantized(Config):
    """The weights as they are, in 16 or 32 bit."""

    type: Literal["none"] = "none"
    is_quantized: ClassVar[bool] = False
    kept_factor: ClassVar[float] = 1.0
    held_share: ClassVar[float] = 0.0
    max_unquantized: ClassVar[float] = 1.0
    dtype: DtypeName = "auto"
    """Dtype of the base weights; `auto` follows `training.precision`. Where that is auto, a base in
    16 bit is computed with in 16 bit."""

    @property
    def held_in(self) -> tuple[str, DtypeName]:
        """The setting that says in which dtype weights are held, and its value."""
        return "dtype", self.dtype

    def compute_in(self, dtype: torch.dtype) -> torch.dtype:
        """What a step computes in, where `training.precision` comes to `dtype`."""
        return _beside(self.dtype, dtype)

    def load_options(self, dtype: torch.dtype) -> dict[str, Any]:
        """Keyword arguments for `from_pretrained`; `dtype` is what `auto` stands for."""
        return {"dtype": resolve_dtype(self.dtype, dtype)}

    def restore(self, model: PreTrainedModel) -> PreTrainedModel:
        """The same weights in float32."""
        model.float()
        return model


QuantizationConfig = Annotated[Nf4 | Fp4 | Int8 | Unquantized, Field(discriminator="type")]
