"""Warn before training about tokens that the base model cannot learn."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from qlora_cli.adapters import FullFineTune, LoRA
from qlora_cli.models.base import load_model
from qlora_cli.models.report import warn_of_untrained
from tests.conftest import save_tiny_model


@pytest.mark.parametrize("kind", ["zero", "tiny", "twin", "trained"])
@pytest.mark.parametrize("tied", [False, True])
def test_an_untrained_stop_token_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str, tied: bool
) -> None:
    model = load_model(save_tiny_model(tmp_path / "model", tie_word_embeddings=tied))
    rows = model.get_output_embeddings().weight
    with torch.no_grad():
        rows[256] = {"zero": 0 * rows[256], "tiny": 1e-3 * rows[256], "twin": rows[259]}.get(
            kind, 0.2 * torch.randn(32)
        )
    model.requires_grad_(False)
    LoRA(r=2).attach(model)
    with caplog.at_level(logging.WARNING, "qlora"):
        found = warn_of_untrained(model, {"<|im_end|>": 256, "a": 64})
    assert found == ([] if kind == "trained" else ["<|im_end|>"])
    assert ("<|im_end|> looks untrained" in caplog.text) is (kind != "trained")


def test_a_trained_head_is_not_warned_about(tmp_path: Path) -> None:
    model = load_model(save_tiny_model(tmp_path / "model"))
    with torch.no_grad():
        model.get_output_embeddings().weight[256] = 0
    FullFineTune().attach(model)
    assert warn_of_untrained(model, {"<|im_end|>": 256}) == []
