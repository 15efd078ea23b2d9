"""Load the base model in the dtype and quantization of a recipe."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Literal

import torch

from qlora_cli.distributed.precision import PRECISIONS
from qlora_cli.distributed.world import World
from qlora_cli.models.base import BaseModelConfig
from qlora_cli.models.product_check import check_products
from qlora_cli.models.quantization import QuantizationConfig
from qlora_cli.models.report import count_base_weights, refuse_mostly_unquantized
from qlora_cli.types import HeadSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger("qlora")


def load_base(
    model: BaseModelConfig,
    quantization: QuantizationConfig,
    dtype: torch.dtype,
    device: torch.device,
    head: HeadSpec | None = None,
) -> PreTrainedModel:
    """Load the base model, and log how many weights it has and how they are held.

    Args:
        head: as in `BaseModelConfig.load`.

    Raises:
        ModelError: the weights or the architecture cannot be loaded, too many of the weights
            stayed unquantized, or a card multiplies wrongly with quantized ones.
    """
    if model.trust_remote_code:
        log.warning("model.trust_remote_code: running code of %s at %s", model.path, model.revision)
    base = model.load(quantization.load_options(dtype), device, head)
    weights = count_base_weights(base)
    log.info(weights.summary())
    refuse_mostly_unquantized(weights, quantization.max_unquantized)
    if device.type == "cuda":
        check_products(base, dtype)
    return base


def compute_dtype(
    quantization: QuantizationConfig,
    precision: Literal["auto", "bf16", "fp16", "fp32"],
    world: World,
) -> torch.dtype:
    """Return the dtype that a step computes in on this device.

    A base held in 16 bit is computed with in 16 bit, under autocast: otherwise its weights and the
    float32 ones that are trained would meet in one product.

    Raises:
        RecipeError: the recipe names a dtype that the device does not have.
    """
    return quantization.compute_in(world.compute_dtype(precision))


def trained_dtype(
    quantization: QuantizationConfig,
    precision: Literal["auto", "bf16", "fp16", "fp32"],
    world: World,
) -> torch.dtype:
    """Return the dtype that a run was trained in, even where this device does not have it.

    Merging computes on the CPU, which has all of them.
    """
    named = {name: dtype for dtype, name in PRECISIONS.items()}
    return quantization.compute_in(named.get(precision) or world.compute_dtype("auto"))
