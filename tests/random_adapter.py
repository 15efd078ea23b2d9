"""LoRA adapters with random factors, which change the model without training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from qlora_cli.adapters import LoRA


def draw_adapter(model: Path, folder: Path, *, seed: int, **settings: Any) -> Path:
    """Save a LoRA adapter of a model with random factors."""
    adapter = LoRA(**{"r": 4, "alpha": 8, **settings})
    base = AutoModelForCausalLM.from_pretrained(model)
    base.name_or_path = base.config._name_or_path = str(model)
    adapted = adapter.attach(base)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            drawn = torch.randn(parameter.shape, generator=generator) * 0.3
            parameter.data = parameter.data * 0.9 if "magnitude" in name else drawn
    folder.mkdir(parents=True, exist_ok=True)
    adapter.save(adapted, folder)
    return folder
