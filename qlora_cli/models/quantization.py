"""Quantization of the frozen base weights."""

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
    """Return the torch dtype of a name. `auto` is the dtype that the step computes in."""
    import torch

    if name == "auto":
        return auto
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _step_dtype(held: DtypeName, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that a step computes in: 16 bit if the base is held in 16 bit, as its
    weights cannot be multiplied with float32."""
    import torch

    return resolve_dtype(held, dtype) if dtype == torch.float32 else dtype


class _Quantized(Config):
    is_quantized: ClassVar[bool] = True

    def restore(self, model: PreTrainedModel) -> PreTrainedModel:
        """Dequantize the weights to float32."""
        import torch

        model.dequantize(torch.float32)
        model.float()
        return model


class FourBit(_Quantized):
    """4-bit NormalFloat (`nf4`: QLoRA, Dettmers et al. 2023, https://arxiv.org/abs/2305.14314) or
    4-bit floating point (`fp4`), in the same blocks."""

    type: Literal["nf4", "fp4"] = "nf4"
    max_unquantized: ClassVar[float] = 0.2
    """Maximum share of the linear weights that may stay in 16 bit; above it the run is refused."""

    double_quant: bool = True
    """Quantize the block constants too. Saves about 0.37 bits per weight (QLoRA, section 3)."""
    compute_dtype: DtypeName = "auto"
    """Dtype of matmuls with dequantized weights; `auto` follows `training.precision`."""
    quant_storage: Literal["uint8", "bfloat16", "float16", "float32"] = "uint8"
    """Dtype of the tensors that hold the packed 4-bit values. Sharded training needs a float."""

    @property
    def held_in(self) -> tuple[str, DtypeName]:
        """Return the setting for the dtype of unquantized weights, and its value."""
        return "compute_dtype", self.compute_dtype

    def compute_in(self, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype that a step computes in, if `training.precision` resolves to `dtype`."""
        return _step_dtype(self.compute_dtype, dtype)

    def load_options(self, dtype: torch.dtype) -> dict[str, Any]:
        """Return keyword arguments for `from_pretrained`; `auto` resolves to `dtype`."""
        import torch
        from transformers import BitsAndBytesConfig

        compute_dtype = resolve_dtype(self.compute_dtype, dtype)
        if {compute_dtype, dtype} == {torch.bfloat16, torch.float16}:
            raise RecipeError(
                f"quantization.compute_dtype ({self.compute_dtype}) and training.precision (here "
                f"{str(dtype).removeprefix('torch.')}) are different 16-bit dtypes",
                hint="--set quantization.compute_dtype=auto",
            )
        return {
            # Unquantized weights (embeddings, norms, head) are held in the compute dtype.
            "dtype": compute_dtype,
            "quantization_config": BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type=self.type,
                bnb_4bit_use_double_quant=self.double_quant,
                bnb_4bit_compute_dtype=compute_dtype,
                bnb_4bit_quant_storage=self.quant_storage,
            ),
        }


class Int8(_Quantized):
    """8-bit weights, outlier columns in 16 bit (LLM.int8, https://arxiv.org/abs/2208.07339)."""

    type: Literal["int8"] = "int8"
    max_unquantized: ClassVar[float] = 0.2
    outlier_threshold: float = Field(6.0, ge=0)
    """Activations above this value are multiplied in 16 bit; 0 turns the outlier path off."""

    @property
    def held_in(self) -> tuple[str, DtypeName]:
        """Return no setting: unquantized weights are held in the compute dtype."""
        return "", "auto"

    def compute_in(self, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype that a step computes in, if `training.precision` resolves to `dtype`."""
        return dtype

    def load_options(self, dtype: torch.dtype) -> dict[str, Any]:
        """Return keyword arguments for `from_pretrained`; unquantized weights get `dtype`."""
        from transformers import BitsAndBytesConfig

        return {
            "dtype": dtype,
            "quantization_config": BitsAndBytesConfig(
                load_in_8bit=True, llm_int8_threshold=self.outlier_threshold
            ),
        }


class Unquantized(Config):
    """No quantization: weights in 16 or 32 bit."""

    type: Literal["none"] = "none"
    is_quantized: ClassVar[bool] = False
    max_unquantized: ClassVar[float] = 1.0
    dtype: DtypeName = "auto"
    """Dtype of the base weights; `auto` follows `training.precision`. With a 16-bit base and
    `training.precision: auto`, steps compute in 16 bit too."""

    @property
    def held_in(self) -> tuple[str, DtypeName]:
        """Return the setting for the dtype of the weights, and its value."""
        return "dtype", self.dtype

    def compute_in(self, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype that a step computes in, if `training.precision` resolves to `dtype`."""
        return _step_dtype(self.dtype, dtype)

    def load_options(self, dtype: torch.dtype) -> dict[str, Any]:
        """Return keyword arguments for `from_pretrained`; `auto` resolves to `dtype`."""
        return {"dtype": resolve_dtype(self.dtype, dtype)}

    def restore(self, model: PreTrainedModel) -> PreTrainedModel:
        """Convert the weights to float32."""
        model.float()
        return model


QuantizationConfig = Annotated[FourBit | Int8 | Unquantized, Field(discriminator="type")]
