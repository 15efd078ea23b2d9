"""Test that models whose code needs values are refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    LlamaConfig,
)
from transformers.models.llama.modeling_llama import LlamaMLP

from qlora_cli.errors import ModelError
from qlora_cli.plan.plan import plan
from qlora_cli.plan.trace.traced_tensor import TracedTensor, refuse_decisions
from qlora_cli.recipe.schema import Recipe
from tests.conftest import exit_code


def choose_rows(_: LlamaMLP, rows: torch.Tensor) -> torch.Tensor:
    return rows[rows > 0]


def branch(self: LlamaMLP, rows: torch.Tensor) -> torch.Tensor:
    return self.down_proj(self.up_proj(rows)) if rows.mean() > 0 else rows


def look_up(self: LlamaMLP, rows: torch.Tensor) -> torch.Tensor:
    return rows * [1.0, 2.0][int(rows.argmax())]


def list_them(_: LlamaMLP, rows: torch.Tensor) -> torch.Tensor:
    return rows * len(rows.tolist())


UNTRACEABLE = [choose_rows, branch, look_up, list_them]


@pytest.mark.parametrize("forward", UNTRACEABLE, ids=lambda one: one.__name__)
def test_model_that_cannot_be_traced_is_refused_by_name(
    tiny_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, forward: Any
) -> None:
    monkeypatch.setattr(LlamaMLP, "forward", forward)
    recipe = tiny_recipe(quantization={"type": "nf4"}, training={"kernels": "plain"})
    with pytest.raises(ModelError, match=r"LlamaConfig is unknown.*in LlamaMLP, it ") as caught:
        plan(recipe, device="T4")
    assert "qlora train tries the largest batches" in str(caught.value.hint)


@pytest.mark.parametrize("option", ["--json", "--table"])
def test_command_says_why_a_model_cannot_be_traced(
    write_recipe: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    option: str,
) -> None:
    monkeypatch.setattr(LlamaMLP, "forward", choose_rows)
    recipe = write_recipe(training={"kernels": "plain"})
    assert exit_code("plan", recipe, "--device", "T4", option) == 3
    assert "in LlamaMLP, it selects rows by values that it has computed" in capsys.readouterr().err


def test_model_that_cannot_be_built_is_refused(
    tiny_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(self: LlamaMLP, _: LlamaConfig) -> None:
        super(LlamaMLP, self).__init__()
        raise ValueError("no such activation")

    monkeypatch.setattr(LlamaMLP, "__init__", build)
    with pytest.raises(ModelError, match="in LlamaMLP, no such activation"):
        plan(tiny_recipe(), device="T4")


def test_only_model_code_may_not_read_traced_values() -> None:
    model = torch.nn.Linear(4, 4)
    refuse_decisions(model)
    some = TracedTensor(torch.ones(2, device="meta"))
    assert some.tolist() == [1.0, 1.0]
    model.register_forward_pre_hook(lambda *_: some.tolist() and None)
    with pytest.raises(NotImplementedError, match="branches on values"):
        model(torch.ones(1, 4))
    assert float(some.sum()) == 1.0
