"""Settings without effect that only the model and the rows show."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest

from qlora_cli.distributed.world import World
from qlora_cli.loop.run_data import read_recipe_data
from qlora_cli.loop.setup import build_setup, warn_of_no_effect
from qlora_cli.recipe.schema import Recipe


@pytest.fixture
def warnings(
    tiny_recipe: Callable[..., Recipe], caplog: pytest.LogCaptureFixture
) -> Callable[..., list[str]]:
    def warnings(**sections: Any) -> list[str]:
        recipe = tiny_recipe(**sections)
        setup = build_setup(recipe, read_recipe_data(recipe), World())
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            warn_of_no_effect(recipe, setup)
        return caplog.messages

    return warnings


def test_packing_that_joins_no_rows(warnings: Callable[..., list[str]]) -> None:
    packed = {"packing": True, "max_lost": 1, "evaluation": None}
    [line] = warnings(data={**packed, "max_length": 40})
    assert line.startswith("data.packing (true) has no effect: no two rows fit into")
    assert not warnings(data={**packed, "max_length": 96})


@pytest.mark.parametrize(("max_steps", "is_endless"), [(4, True), (None, False)])
def test_a_batch_larger_than_the_data(
    warnings: Callable[..., list[str]], max_steps: int | None, is_endless: bool
) -> None:
    [line] = warnings(training={"batch_size": 32, "max_steps": max_steps})
    assert line.startswith("training.batch_size (32) is more than the 16 rows of an epoch")
    assert line.endswith("several times") == is_endless
    assert not warnings(training={"batch_size": 16})


def test_kernels_that_no_layer_can_have(warnings: Callable[..., list[str]]) -> None:
    [line] = warnings(training={"kernels": "fused"}, model={"attention": "eager"})
    assert line.startswith("training.kernels (fused) has no effect")
    assert not warnings(training={"kernels": "fused"})
