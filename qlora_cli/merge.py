"""The adapter into the weights it was trained against, checked before it is called done."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qlora_cli._compat import quiet_libraries
from qlora_cli.errors import ModelError, RecipeError
from qlora_cli.model.base import load_model, load_tokenizer
from qlora_cli.recipe import Recipe
from qlora_cli.recipe_file import load_recipe
from qlora_cli.run_folder import RunFolder, Weights, readable_as_the_folder
from qlora_cli.world import World

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

log = logging.getLogger("qlora")

MAX_LOGIT_ERROR = 1e-3
"""Largest difference of float32 logits, merged against unmerged, over the range of the logits."""
MAX_KL = 0.02
"""Largest mean KL divergence (nats a token) of the written model from base plus adapter.

Rounding merged weights to bfloat16 costs about 0.002; a merge into 4 bit, which loses the adapter,
0.8."""

_PROMPTS = (
    "The quick brown fox jumps over the lazy dog, and then it goes home.",
    "Q: A train leaves at 9:40 and arrives at 11:05. How long does the journey take?\nA:",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    '{"name": "table", "legs": 4, "colours": ["red", "blue"]}',
    "Übermorgen fahren wir ans Meer. C'est la vie. Mañana será otro día.",
)


def merge(
    run_folder: Path, output: Path, overrides: Sequence[str] = (), *, weights: Weights
) -> dict[str, Any]:
    """Write a plain model folder that needs neither adapter nor quantization.

    The delta is added in float32 to exactly the weights that it was trained against: for a
    quantized run the dequantized ones, since those were what the adapter learnt to correct. The sum
    is kept in the base's 16 bit and never packed into 4 bit, where rounding would undo it.

    Returns:
        {"output", "weights", "dtype", "bytes", "logit_error", "kl", "top1_agreement",
        "kl_as_trained"}: `kl` and `top1_agreement` compare what was written with the dequantized
        base plus adapter in float32, `kl_as_trained` with the quantized base plus adapter in the
        run's precision (8-bit bases quantize their activations too, which no merge can repeat).

    Raises:
        RecipeError: no finished run, or `output` exists.
        ModelError: the written model does not compute what base plus adapter computes.
    """
    quiet_libraries()
    run = RunFolder(run_folder)
    recipe = load_recipe(run.recipe, overrides).recipe if run.record.exists() else None
    if recipe is None:
        raise RecipeError(f"{run_folder} is no run folder", hint="give the output.dir of a run")
    if output.exists():
        raise RecipeError(f"--output: {output} exists", hint="choose another folder, or remove it")
    trained = run.weights(weights)
    tokenizer = load_tokenizer(trained, trust_remote_code=recipe.model.trust_remote_code)
    inputs = [torch.tensor([tokenizer(text)["input_ids"]]) for text in _PROMPTS]

    unfinished = output.with_name(f".{output.name}.unfinished")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    except OSError as error:
        raise RecipeError(f"--output: {output}: {error.strerror}") from error
    try:
        quantized = trained_logits(recipe, trained, inputs)
        merged, unmerged, logit_error = merge_in_float32(recipe, trained, inputs)
        dtype = base_dtype(recipe)
        write(merged.to(dtype), tokenizer, trained, unfinished)
        del merged
        written = reload_logits(unfinished, inputs)
        report = {
            "output": str(output),
            "weights": weights,
            "dtype": str(dtype).removeprefix("torch."),
            "bytes": sum(file.stat().st_size for file in unfinished.glob("*.safetensors")),
            "logit_error": logit_error,
            **compare(unmerged, written),
            "kl_as_trained": compare(quantized, written)["kl"],
        }
        refuse_infidelity(report)
        (unfinished / "merge.json").write_text(
            json.dumps(report, indent=2) + "\n", encoding="utf-8"
        )
        unfinished.rename(output)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return report


def trained_logits(recipe: Recipe, trained: Path, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Logits of base plus adapter as they were trained: quantized, in the recipe's precision."""
    world = World()
    dtype = world.compute_dtype(recipe.training.precision)
    base = recipe.model.load(recipe.quantization.load_options(dtype), world.device)
    model = recipe.adapter.load(base, trained).eval()
    with torch.autocast(world.device.type, dtype, enabled=dtype != torch.float32):
        return logits_of(model, inputs, world.device)


def merge_in_float32(
    recipe: Recipe, trained: Path, inputs: Sequence[Tensor]
) -> tuple[Any, list[Tensor], float]:
    """The merged model, the logits before merging, and their largest relative change by it."""
    cpu = torch.device("cpu")
    dtype = World().compute_dtype(recipe.training.precision)
    base = recipe.model.load(recipe.quantization.load_options(dtype), cpu)
    base = recipe.quantization.restore(base)
    model = recipe.adapter.load(base, trained).eval()
    before = logits_of(model, inputs, cpu)
    merged = recipe.adapter.merge(model).eval()
    after = logits_of(merged, inputs, cpu)
    pairs = list(zip(before, after, strict=True))
    error = max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)
    log.info("merged in float32; logits differ by at most %.1e of their range", error)
    return merged, before, error


def base_dtype(recipe: Recipe) -> torch.dtype:
    """The dtype of the base model's own files."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(
        recipe.model.locate(),
        local_files_only=True,
        trust_remote_code=recipe.model.trust_remote_code,
    )
    dtype: torch.dtype | None = config.dtype
    return dtype or torch.bfloat16


def write(model: Any, tokenizer: PreTrainedTokenizerFast, trained: Path, folder: Path) -> None:
    """An ordinary model folder: weights, config, tokenizer with template, generation config."""
    from transformers import GenerationConfig

    model.generation_config = GenerationConfig.from_pretrained(trained)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    readable_as_the_folder(folder)


def reload_logits(folder: Path, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Logits of what was written, computed in float32: what differs is then the weights alone."""
    model = load_model(folder, dtype=torch.float32).eval()
    return logits_of(model, inputs, torch.device("cpu"))


@torch.no_grad()
def logits_of(model: Any, inputs: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Float32 logits (T, V) on the host, for each of the token rows (1, T)."""
    return [
        model(input_ids=row.to(device), use_cache=False).logits[0].float().cpu() for row in inputs
    ]


def compare(reference: Sequence[Tensor], found: Sequence[Tensor]) -> dict[str, float]:
    """Mean KL(reference || found) in nats a token, and how often the likeliest token agrees."""
    p = torch.log_softmax(torch.cat(list(reference)), -1)  # (T, V)
    q = torch.log_softmax(torch.cat(list(found)), -1)
    return {
        "kl": float((p.exp() * (p - q)).sum(-1).mean()),
        "top1_agreement": float((p.argmax(-1) == q.argmax(-1)).float().mean()),
    }


def refuse_infidelity(report: dict[str, Any]) -> None:
    """Nothing is kept of a merge that is not the trained model.

    Raises:
        ModelError: a figure of the report is beyond its tolerance.
    """
    # Written so that NaN fails.
    if not (report["logit_error"] <= MAX_LOGIT_ERROR and report["kl"] <= MAX_KL):
        raise ModelError(
            "the merged model is not the trained one: float32 logits differ by "
            f"{report['logit_error']:.1e} (at most {MAX_LOGIT_ERROR:.0e}), KL is "
            f"{report['kl']:.1e} (at most {MAX_KL:.0e}); nothing was written"
        )
