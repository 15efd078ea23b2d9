"""Compare the logits of a merged model with those of base plus adapter."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import Tensor

from qlora_cli.common.formatting import size_text
from qlora_cli.data.prepared.cache import read_data
from qlora_cli.distributed.world import World
from qlora_cli.errors import DataError, ModelError
from qlora_cli.evaluate.divergence import TEXTS, compare
from qlora_cli.models.base import load_model
from qlora_cli.models.loading import trained_dtype
from qlora_cli.objectives.head_outputs import HeadOutputs
from qlora_cli.recipe.schema import Recipe
from qlora_cli.runs.merge_report import BaseChoiceReport, ComparisonReport
from qlora_cli.types import IGNORE_INDEX, Batch, HeadSpec, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

log = logging.getLogger("qlora")

MAX_LOGIT_ERROR = 1e-3
"""Largest difference of a logit, relative to the largest logit, where the base is in float32."""
MAX_KL = 0.02
"""Largest mean KL divergence (nats per token) of the written model from base plus adapter.

Rounding merged weights to bfloat16 costs about 0.002. A merge into 4 bit, which loses the adapter,
costs 0.8."""

_MAX_LOGITS = 2**25
"""Maximum number of logits that are kept per model: tokens times vocabulary."""
_MAX_TOKENS = 1024
_MAX_LENGTH = 256


@dataclass(frozen=True, slots=True)
class ComparedText:
    """A text to compare on, with labels where it has an answer."""

    input_ids: Tensor
    """(1, T)."""
    labels: Tensor
    """(T,), IGNORE_INDEX for tokens that are not supervised."""


@dataclass(frozen=True, slots=True)
class ModelOutputs:
    """Logits and loss of a model for the texts."""

    logits: list[Tensor]
    """Float32 (T, V) for each text."""
    loss: float | None
    """Mean over the supervised tokens; None if there are none."""


@dataclass(frozen=True, slots=True)
class LogitComparison:
    """How close the written model is to base plus adapter. See `MergeReport`."""

    logit_error: float
    kl: float
    top1_agreement: float
    comparison: ComparisonReport


def compare_models(
    recipe: Recipe, trained: Path, written: Path, tokenizer: PreTrainedTokenizerFast, base: str
) -> LogitComparison | None:
    """Load the written model and compare it with base plus adapter.

    Returns:
        The comparison, or None where memory is too small for it.
    """
    values = sum(file.stat().st_size for file in written.glob("*.safetensors")) // 2
    needed = 5 * values + 4 * 4 * _MAX_LOGITS
    if (free := free_memory()) < needed:
        log.warning(
            "logits are not compared: the model would take %s of memory, and %s are free; "
            "the weights have been compared one by one",
            size_text(needed),
            size_text(free),
        )
        return None
    rows, available = read_rows(recipe, tokenizer)
    head = recipe.objective.head
    measured = _trained(recipe, trained, rows)
    bases = {"as-trained": _dequantized, "original": _original}
    loaders = bases if recipe.quantization.is_quantized else {base: _original}
    live = {name: _in_float32(load, recipe, trained, rows) for name, load in loaders.items()}
    found = _written(written, head, rows)
    pairs = list(zip(live[base].logits, found.logits, strict=True))
    return LogitComparison(
        max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs),
        **compare(live[base].logits, found.logits),
        comparison=ComparisonReport(
            rows=len(rows),
            tokens=sum(row.input_ids.shape[1] for row in rows),
            held_out=available is not None,
            held_out_rows=available,
            trained_loss=measured.loss,
            choices={
                name: BaseChoiceReport(**compare(measured.logits, one.logits), loss=one.loss)
                for name, one in {**live, base: found}.items()
            },
        ),
    )


def free_memory() -> int:
    """Return the bytes that can be allocated without swapping."""
    return int(psutil.virtual_memory().available)


def read_rows(
    recipe: Recipe, tokenizer: PreTrainedTokenizerFast
) -> tuple[list[ComparedText], int | None]:
    """Return the first rows of the evaluation set and its size, or some fixed texts and None."""
    if sources := recipe.data.evaluation_sources:
        try:
            held_out = read_data(
                "evaluation", recipe.data, sources, tokenizer, objective=recipe.objective
            )
        except DataError as error:
            log.warning("models are compared on fixed texts, not on evaluation rows: %s", error)
        else:
            vocabulary = len(tokenizer)
            first = list(_first(held_out.examples, _MAX_LOGITS // vocabulary))
            return first, len(held_out.examples)
    texts = [torch.tensor([tokenizer(text)["input_ids"]]) for text in TEXTS]
    return [ComparedText(ids, torch.full_like(ids[0], IGNORE_INDEX)) for ids in texts], None


def _first(examples: Sequence[Any], max_tokens: int) -> Iterator[ComparedText]:
    left = min(max_tokens, _MAX_TOKENS)
    for example in examples:
        # The answer is at the end of a row.
        ids = torch.tensor([example.input_ids[-_MAX_LENGTH:]])
        yield ComparedText(ids, torch.tensor(example.labels[-_MAX_LENGTH:]))
        left -= ids.shape[1]
        if left < _MAX_LENGTH:
            return


def _trained(recipe: Recipe, trained: Path, rows: list[ComparedText]) -> ModelOutputs:
    """Compute with base plus adapter as trained: quantized, in the recipe's precision."""
    world = World(recipe.device)
    dtype = trained_dtype(recipe.quantization, recipe.training.precision, world)
    device = world.device if world.computes_in(dtype) else torch.device("cpu")
    head = recipe.objective.head
    base = recipe.model.load(recipe.quantization.load_options(dtype), device, head)
    model = recipe.adapter.load(base, trained).eval()
    if head is not None:
        return _measure_outputs(model, dtype, rows, device, head.problem)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        return measure(model, rows, device)


def _written(folder: Path, head: HeadSpec | None, rows: list[ComparedText]) -> ModelOutputs:
    """Compute with the written model in float32, as transformers does."""
    model: Any = load_model(folder, head, dtype=torch.float32).eval()
    cpu = torch.device("cpu")
    if head is None:
        return measure(model, rows, cpu)
    return measure_head(lambda ids: model(input_ids=ids).logits, rows, cpu, head.problem)


def _dequantized(recipe: Recipe) -> Any:
    cpu = torch.device("cpu")
    dtype = trained_dtype(recipe.quantization, recipe.training.precision, World(recipe.device))
    base = recipe.model.load(recipe.quantization.load_options(dtype), cpu, recipe.objective.head)
    return recipe.quantization.restore(base)


def _original(recipe: Recipe) -> Any:
    return recipe.model.load({"dtype": torch.float32}, torch.device("cpu"), recipe.objective.head)


def _in_float32(
    load: Callable[[Recipe], Any], recipe: Recipe, trained: Path, rows: list[ComparedText]
) -> ModelOutputs:
    model, cpu = recipe.adapter.load(load(recipe), trained).eval(), torch.device("cpu")
    if (head := recipe.objective.head) is not None:
        return _measure_outputs(model, torch.float32, rows, cpu, head.problem)
    return measure(model, rows, cpu)


def _measure_outputs(
    model: Any,
    dtype: torch.dtype,
    rows: Sequence[ComparedText],
    device: torch.device,
    problem: Problem,
) -> ModelOutputs:
    """Compute the outputs of the head of base plus adapter, as in training."""
    outputs = HeadOutputs(model, dtype)
    return measure_head(
        lambda ids: outputs(Batch(ids, torch.ones_like(ids), ids)), rows, device, problem
    )


@torch.no_grad()
def measure_head(
    outputs: Callable[[Tensor], Tensor],
    rows: Sequence[ComparedText],
    device: torch.device,
    problem: Problem,
) -> ModelOutputs:
    """Compute the outputs of a head for all texts, on the host.

    They become one tensor of logits, because a single output may be near 0. An output that stands
    for itself (`multi`, `regression`, a reward) is the logit of one of two classes.

    Args:
        outputs: maps token ids (1, T) to the outputs (1, K).
    """
    found = torch.cat([outputs(row.input_ids.to(device)).float().cpu() for row in rows])  # (N, K)
    if problem == "single":
        return ModelOutputs([found], None)
    return ModelOutputs([torch.stack([found, torch.zeros_like(found)], -1).flatten(0, 1)], None)


@torch.no_grad()
def measure(model: Any, rows: Sequence[ComparedText], device: torch.device) -> ModelOutputs:
    """Compute the logits of each text, on the host, and the loss on the answers."""
    logits, total, count = [], 0.0, 0
    for row in rows:
        ids = row.input_ids.to(device)
        found = model(input_ids=ids, use_cache=False).logits[0].float().cpu()
        total += float(
            torch.nn.functional.cross_entropy(
                found[:-1], row.labels[1:], ignore_index=IGNORE_INDEX, reduction="sum"
            )
        )
        count += int((row.labels[1:] != IGNORE_INDEX).sum())
        logits.append(found)
    return ModelOutputs(logits, total / count if count else None)


def refuse_infidelity(found: LogitComparison, *, is_exact: bool) -> None:
    """Refuse a merge that does not compute what the trained model computes.

    Args:
        is_exact: no weight was rounded in memory or on the disk.

    Raises:
        ModelError: a figure is beyond its tolerance.
    """
    bound = MAX_LOGIT_ERROR if is_exact else math.inf
    # Written so that NaN fails.
    if not (found.logit_error <= bound and found.kl <= MAX_KL):
        raise ModelError(
            "the merged model is not the trained one: logits differ by "
            f"{found.logit_error:.1e} of their range (at most {bound:.0e}), KL is "
            f"{found.kl:.1e} (at most {MAX_KL:.0e}); nothing was written"
        )
