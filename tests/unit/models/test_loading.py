"""Load the base model, and choose the dtype to compute in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from qlora_cli.distributed.world import World
from qlora_cli.models.loading import compute_dtype


@pytest.mark.parametrize(
    "quantization",
    [{"type": "none", "dtype": "bfloat16"}, {"type": "nf4", "compute_dtype": "bfloat16"}],
    ids=lambda one: one["type"],
)
def test_auto_precision_is_16_bit_on_a_base_held_in_16_bit(
    tiny_recipe: Callable[..., Any], quantization: dict[str, str]
) -> None:
    recipe = tiny_recipe(quantization=quantization, training={"precision": "auto"})
    assert compute_dtype(recipe.quantization, recipe.training.precision, World()) == torch.bfloat16
