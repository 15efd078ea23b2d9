"""A model folder packed into 4 bit, and how far that takes it from the model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_cli.errors import RecipeError
from qlora_cli.merge import compare, logits_of
from qlora_cli.model.base import load_model, load_tokenizer
from qlora_cli.model.quantization import Nf4
from qlora_cli.probes import TEXTS
from qlora_cli.run_folder import readable_as_the_folder


def export_4bit(folder: Path, output: Path) -> dict[str, Any]:
    """Write the model in NF4 with double quantization, as bitsandbytes packs it.

    Rounding to 4 bit takes away a part of what an adapter added to the weights: the figures say how
    much. What was trained exactly is the base in 4 bit with the adapter beside it.

    Returns:
        {"path", "bytes", "kl", "top1_agreement"}, comparing the written folder, loaded again and
        computed in float32, with `folder` in float32.

    Raises:
        RecipeError: `output` exists.
        ModelError: it cannot be loaded.
    """
    if output.exists():
        raise RecipeError(f"--bnb-4bit: {output} exists", hint="choose another folder")
    tokenizer = load_tokenizer(folder)
    rows = [torch.tensor([tokenizer(text)["input_ids"]]) for text in TEXTS]
    cpu = torch.device("cpu")
    reference = logits_of(load_model(folder, dtype=torch.float32).eval(), rows, cpu)
    unfinished = output.with_name(f".{output.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        load_model(folder, **Nf4().load_options(torch.bfloat16)).save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        for name in ("generation_config.json", "README.md"):
            if (folder / name).is_file():
                shutil.copyfile(folder / name, unfinished / name)
        readable_as_the_folder(unfinished)
        figures = compare(reference, _reloaded(unfinished, rows))
        unfinished.rename(output)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    size = sum(file.stat().st_size for file in output.glob("*.safetensors"))
    return {"path": str(output), "bytes": size, **figures}


def _reloaded(folder: Path, rows: list[Tensor]) -> list[Tensor]:
    """Logits of the packed weights in float32, so that what differs is the packing alone."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    model.dequantize(torch.float32)
    return logits_of(model.float().eval(), rows, torch.device("cpu"))
