"""Pack a model folder into 4 bit, and measure what that costs."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from qlora_cli.common.atomic_files import atomic_folder
from qlora_cli.common.untrusted_files import read_object
from qlora_cli.errors import ModelError, RecipeError
from qlora_cli.evaluate.divergence import TEXTS, compare, logits_of
from qlora_cli.export.report import PackedModel, TrainedAgreement
from qlora_cli.models.base import load_model
from qlora_cli.models.heads import CAUSAL_LM
from qlora_cli.models.quantization import FourBit
from qlora_cli.models.tokenizer import load_tokenizer
from qlora_cli.models.tokenizer_files import save_tokenizer
from qlora_cli.runs.run_folder import RunFolder, recipe_of_run

log = logging.getLogger("qlora")


def export_4bit(folder: Path, output: Path, run: Path | None) -> PackedModel:
    """Write the model in NF4 with double quantization, as bitsandbytes packs it.

    Weights that were dequantized from NF4 lie on its grid, so packing undoes all but large updates.
    The weights of a merge into the original base are rounded up as often as down, so that most of
    an update stays.

    Args:
        run: the run that `folder` was merged from, to compare with what was trained.

    Raises:
        RecipeError: `output` exists, or `run` is not a run.
        ModelError: a model cannot be loaded.
    """
    if output.exists():
        raise RecipeError(f"--bnb-4bit: {output} exists", hint="choose another folder")
    merged = _merge_record(folder)
    if merged.get("base") == "as-trained":
        log.warning(
            "--bnb-4bit: %s was merged into weights that lie on the 4-bit grid, so packing undoes "
            "most of the update; pack a merge with --base original",
            folder,
        )
    tokenizer = load_tokenizer(folder)
    rows = [tokenizer(text)["input_ids"] for text in TEXTS]
    trained = None if run is None else _trained_logits(run, merged.get("weights", "last"), rows)
    unpacked = logits_of(load_model(folder, dtype=torch.float32).eval(), rows)
    try:
        with atomic_folder(output) as unfinished:
            load_model(folder, **FourBit().load_options(torch.bfloat16)).save_pretrained(unfinished)
            save_tokenizer(tokenizer, folder, unfinished)
            for name in ("generation_config.json", "README.md"):
                if (folder / name).is_file():
                    shutil.copyfile(folder / name, unfinished / name)
            packed = _packed_logits(unfinished, rows)
    except (OSError, SafetensorError) as error:
        raise RecipeError(
            f"--bnb-4bit: {output} could not be written, and nothing is left of it: {error}"
        ) from error
    return PackedModel(
        path=str(output),
        bytes=sum(file.stat().st_size for file in output.glob("*.safetensors")),
        tokens=sum(map(len, rows)),
        **compare(unpacked, packed),
        trained=None if trained is None else TrainedAgreement(**compare(trained, packed)),
    )


def _merge_record(folder: Path) -> dict[str, Any]:
    path = folder / "merge.json"
    try:
        return read_object(path) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error


def _trained_logits(run: Path, weights: Any, rows: list[list[int]]) -> list[Tensor]:
    """Compute the logits of base plus adapter in float32, with the base as quantized."""
    folder = RunFolder(run)
    trained = folder.weights(weights)
    recipe = recipe_of_run(folder)
    base = recipe.model.load(recipe.quantization.load_options(torch.bfloat16), torch.device("cpu"))
    model = recipe.adapter.load(recipe.quantization.restore(base), trained).eval()
    return logits_of(model, rows)


def _packed_logits(folder: Path, rows: list[list[int]]) -> list[Tensor]:
    """Compute the logits of the packed weights in float32: only packing makes a difference."""
    model: Any = CAUSAL_LM.auto_class().from_pretrained(folder, local_files_only=True)
    model.dequantize(torch.float32)
    return logits_of(model.float().eval(), rows)
