"""What the stories build in the same way: data, base model, measurement."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch

from qlora_cli.data.config import Data
from qlora_cli.data.prepared.audit import Finding, find_drift, findings
from qlora_cli.data.batching.sampler import BatchStream, eval_batches
from qlora_cli.data.prepared.cache import load_or_prepare
from qlora_cli.data.render.encode import Encoder
from qlora_cli.data.prepared.prepare import Prepared
from qlora_cli.data.prepared.statistics import Audit, Rows, Scan, scan
from qlora_cli.data.sources import BadRows, Source
from qlora_cli.errors import TrainingError
from qlora_cli.models.identity import identify, refuse_other_base
from qlora_cli.models.report import refuse_unquantized, report_weights
from qlora_cli.objectives.supervised import TokenLoss, evaluate_loss
from qlora_cli.recipe.schema import Recipe
from qlora_cli.recipe.load import load_recipe
from qlora_cli.runs.run_folder import RunFolder
from qlora_cli.tasks.task import Task
from qlora_cli.types import Batch, Conversation
from qlora_cli.distributed.world import World

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

log = logging.getLogger("qlora")

_COMPARED = 256
"""Rows of a source whose prompt is rendered again, as it is for generation."""


def read_data(
    name: str,
    data: Data,
    sources: list[Source],
    tokenizer: PreTrainedTokenizerFast,
    *,
    use_cache: bool = True,
) -> Prepared:
    """The examples of all sources, with a line about them in the log."""
    prepared, is_old = load_or_prepare(sources, tokenizer, data, use_cache=use_cache)
    log.info("%s data%s: %s", name, " (as prepared before)" if is_old else "", prepared.summary())
    return prepared


def stream_batches(
    recipe: Recipe,
    learnt: Prepared,
    tokenizer: PreTrainedTokenizerFast,
    *,
    is_flat: bool,
    rank: int = 0,
    world_size: int = 1,
) -> BatchStream:
    """The micro-batches that a rank learns from, for any step.

    Args:
        is_flat: whether examples lie end to end rather than being padded.
    """
    settings, weights = recipe.training, [source.weight for source in recipe.data.train_sources]
    return BatchStream(
        learnt.examples,
        batch_size=settings.batch_size,
        micro_batch_size=settings.rows_per_forward,
        seed=settings.seed,
        epochs=settings.passes,
        pad_token_id=tokenizer.pad_token_id,
        parts=list(zip(learnt.examples.num_by_source(len(weights)), weights, strict=True)),
        max_length=recipe.data.max_length if recipe.data.packing else None,
        padding=not is_flat,
        rank=rank,
        world_size=world_size,
    )


def largest_eval_batch(
    held_out: Prepared | None, batch_size: int, tokenizer: PreTrainedTokenizerFast
) -> Batch | None:
    """The batch of an evaluation that needs the most memory: the first, if there is any."""
    if held_out is None:
        return None
    pad_token_id = tokenizer.pad_token_id
    return next(eval_batches(held_out.examples, batch_size=batch_size, pad_token_id=pad_token_id))


@dataclass(frozen=True, slots=True)
class Audited:
    """One side of the data, and what was found in it."""

    name: str
    prepared: Prepared
    scan: Scan
    audit: Audit
    findings: list[Finding]

    @property
    def truncated(self) -> float:
        """Share of rows that are longer than `data.max_length`."""
        return self.prepared.num_truncated / self.prepared.num_rows

    def summary(self) -> str:
        """One line for the log."""
        total = self.audit.total
        found = "; ".join(
            f"{finding.what}: {', '.join([finding.found, *finding.named[:1]])}"
            for finding in self.findings
            if finding.count
        )
        return (
            f"audit of {self.name} data: {total.shortest:,} to {total.longest:,} tokens a row, "
            f"median {total.median:,}; {found or 'nothing suspect'}"
        )


def audit_data(
    data: Data, learnt: Prepared, held_out: Prepared | None, tokenizer: PreTrainedTokenizerFast
) -> list[Audited]:
    """What the rows come to, and what in them is often a mistake: training, then evaluation."""
    training = _audited("training", data, learnt, tokenizer, None)
    if held_out is None:
        return [training]
    return [training, _audited("evaluation", data, held_out, tokenizer, training)]


def check_data(
    data: Data, learnt: Prepared, held_out: Prepared | None, tokenizer: PreTrainedTokenizerFast
) -> dict[str, dict[str, Any]]:
    """The audit, with a line about each side in the log. Returns the figures.

    Raises:
        DataError: a limit of `data.audit` is crossed.
    """
    sides = audit_data(data, learnt, held_out, tokenizer)
    for side in sides:
        is_suspect = any(finding.count for finding in side.findings)
        log.log(logging.WARNING if is_suspect else logging.INFO, side.summary())
    check_limits(data, sides)
    return {side.name: side.audit.record() for side in sides}


def check_limits(data: Data, sides: list[Audited]) -> None:
    """Raises DataError if a limit of `data.audit` is crossed."""
    training, *others = sides
    evaluation = others[0].audit if others else None
    data.audit.check(training.audit, evaluation, truncated=training.truncated)


def _audited(
    name: str,
    data: Data,
    prepared: Prepared,
    tokenizer: PreTrainedTokenizerFast,
    training: Audited | None,
) -> Audited:
    rows = prepared.examples
    scanned = scan(rows, tokenizer, max_length=data.max_length)
    audit = scanned.audit(None if training is None else training.scan)
    learnt = None if training is None else training.prepared.examples
    sources = data.train_sources if training is None else data.evaluation_sources
    prompts = [
        pair
        for i, source in enumerate(sources)
        for pair in _first_prompts(source, rows, _candidates(source, scanned, i), data, tokenizer)
    ]
    cut = Finding("rows longer than data.max_length", prepared.num_truncated, prepared.num_rows)
    found = findings(rows, audit, find_drift(rows, prompts), cut, training=learnt)
    return Audited(name, prepared, scanned, audit, found)


def _candidates(source: Source, scanned: Scan, index: int) -> list[int]:
    """Rows of a source among which those are that its files begin with."""
    return scanned.first_rows(index, None if source.shuffle else _COMPARED)


def _first_prompts(
    source: Source,
    rows: Rows,
    candidates: list[int],
    data: Data,
    tokenizer: PreTrainedTokenizerFast,
) -> Iterator[tuple[int, list[int]]]:
    """Rows that are not cut, and what the model is given to generate their last answer."""
    encoder = Encoder(tokenizer)
    for row, conversation in islice(_first_located(source, rows, candidates), _COMPARED):
        has_prompt = any(message.train for message in conversation.messages[1:])
        # What is cut has this length.
        is_whole = len(rows[row].input_ids) < data.max_length
        if has_prompt and not conversation.learn_all and is_whole:
            prompt = encoder.to_prompt(conversation.messages, conversation.tools)
            yield row, prompt.input_ids


def _first_located(
    source: Source, rows: Rows, candidates: list[int]
) -> Iterator[tuple[int, Conversation]]:
    """What the files begin with, with the row that it became; without what became several."""
    # Not in the order of `shuffle`, which takes a whole source to be read before its first row.
    conversations = source.in_file_order().conversations(BadRows())
    num_left = len(candidates)
    while num_left > 0 and (some := {one.place: one for one in islice(conversations, _COMPARED)}):
        found = [row for row in candidates if rows.place(row) in some]
        times = Counter(rows.place(row) for row in found)
        for row in found:
            if times[rows.place(row)] == 1:
                yield row, some[rows.place(row)]
        num_left -= len(found)


Exam = list[tuple[Task, Sequence[Any]]]
"""Tasks, each with its questions."""


def read_exam(recipe: Recipe, tasks: Sequence[Task], tokenizer: PreTrainedTokenizerFast) -> Exam:
    """What each of the tasks asks.

    Raises:
        DataError: a row cannot be asked about, or has a reference that cannot be scored against.
    """
    held_out, limit = recipe.data.evaluation_sources, recipe.evaluation.limit
    exam: Exam = []
    for task in tasks:
        sources = held_out if task.data is None else [task.data]
        exam.append((task, task.questions(sources, tokenizer, recipe.data, limit=limit)))
    return exam


def recipe_of_run(run: RunFolder, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a run, with what the user changes of it.

    Raises:
        ModelError: its model is not the one that the run was trained on.
    """
    recipe = load_recipe(run.recipe, overrides).recipe
    trained_on = load_recipe(run.recipe).recipe.model.path
    here = identify(recipe.model.locate())
    known = run.read_record().get("base")
    refuse_other_base(run.root, known, trained_on, recipe.model.path, here)
    return recipe


def compute_dtype(recipe: Recipe, world: World) -> torch.dtype:
    """What a step computes in here. Weights that are held in 16 bit are computed with in 16 bit,
    under autocast: float32 ones, which are trained beside them, would meet them in one product.

    Raises:
        RecipeError: it was asked for by name, and the device does not have it.
    """
    return recipe.quantization.compute_in(world.compute_dtype(recipe.training.precision))


def load_base(recipe: Recipe, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The base model as the recipe wants it held, with a line about it in the log."""
    if recipe.model.trust_remote_code:
        log.warning(
            "model.trust_remote_code: running code of %s at %s",
            recipe.model.path,
            recipe.model.revision,
        )
    model = recipe.model.load(recipe.quantization.load_options(dtype), device)
    weights = report_weights(model)
    log.info(weights.summary())
    refuse_unquantized(weights, recipe.quantization.max_unquantized)
    return model


def measure(
    objective: TokenLoss,
    held_out: Prepared,
    tokenizer: PreTrainedTokenizerFast,
    batch_size: int,
    world: World,
) -> dict[str, float]:
    """Loss (mean over all supervised tokens) and perplexity on held-out examples.

    Raises:
        TrainingError: the loss is not finite.
    """
    batches = eval_batches(
        held_out.examples,
        batch_size=batch_size,
        pad_token_id=tokenizer.pad_token_id,
        rank=world.rank,
        world_size=world.size,
    )
    totals = world.sum(evaluate_loss(objective, batches, world.device))
    loss = float(totals[0] / totals[1])
    if not math.isfinite(loss):
        raise TrainingError(f"the loss on held-out rows is {loss}: the weights are damaged")
    return {"eval_loss": loss, "eval_perplexity": math.exp(min(loss, 700.0))}
