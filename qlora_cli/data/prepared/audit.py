"""Audit the training and evaluation rows of a run: statistics, findings, limits."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

from qlora_cli.data.config import Data
from qlora_cli.data.encode.encoder import Encoder
from qlora_cli.data.prepared.findings import (
    Finding,
    find_drift,
    findings,
    pair_findings,
    score_findings,
)
from qlora_cli.data.prepared.labels import find_balance, find_label_variants
from qlora_cli.data.prepared.prepare import PreparedData
from qlora_cli.data.prepared.scan import DatasetScan, scan
from qlora_cli.data.prepared.statistics import NAMED, DatasetStatistics, LocatedExamples
from qlora_cli.data.sources import BadRows, Source
from qlora_cli.errors import DataError
from qlora_cli.objectives import SUPERVISED, ObjectiveSettings
from qlora_cli.types import Conversation, ModelContext

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

log = logging.getLogger("qlora")

_COMPARED = 256
"""Rows per source whose prompt is rendered again, as for generation."""


@dataclass(frozen=True, slots=True)
class AuditedDataset:
    """The training or evaluation rows, with their statistics and findings."""

    name: str
    prepared: PreparedData
    scan: DatasetScan
    audit: DatasetStatistics
    findings: list[Finding]
    beyond: Finding | None
    """Rows longer than the model's context; None if that is not known."""
    has_answers: bool = True
    """The rows have supervised turns, and not a label in their place."""
    labels: Mapping[str, int] | None = None
    """In rows with labels: the number of rows with each."""

    @property
    def truncated(self) -> float:
        """Share of rows longer than `data.max_length`."""
        return self.prepared.num_truncated / self.prepared.num_rows

    def summary(self) -> str:
        """Summarize the audit in one line for the log."""
        total = self.audit.total
        found = "; ".join(
            ", ".join([f"{finding.what}: {finding.found}", *_example(finding), *finding.remedy])
            for finding in self.findings
            if finding.is_suspect and finding is not self.beyond
        )
        return (
            f"audit of {self.name} data: {total.shortest:,} to {total.longest:,} tokens a row, "
            f"median {total.median:,}; {found or 'nothing suspicious'}"
        )


def _example(finding: Finding) -> list[str]:
    """Return the first that a finding names, and the number of others, in one line."""
    return [text] if (text := " ".join(finding.first_named(1))) else []


def audit_data(
    data: Data,
    training_data: PreparedData,
    held_out: PreparedData | None,
    tokenizer: PreTrainedTokenizerFast,
    *,
    context: ModelContext | None = None,
    objective: ObjectiveSettings = SUPERVISED,
) -> list[AuditedDataset]:
    """Audit the training rows, then the evaluation rows.

    Args:
        context: that of the model, if known.
        objective: remarks on the balance of labels.
    """
    audited = partial(_audited, data, tokenizer, context, objective)
    training = audited("training", training_data, None)
    return [training] if held_out is None else [training, audited("evaluation", held_out, training)]


def check_data(
    data: Data,
    training_data: PreparedData,
    held_out: PreparedData | None,
    tokenizer: PreTrainedTokenizerFast,
    *,
    context: ModelContext | None = None,
    objective: ObjectiveSettings = SUPERVISED,
) -> dict[str, dict[str, Any]]:
    """Audit the rows, log a line about each dataset, and return the statistics.

    Args:
        context: that of the model, if known.
        objective: remarks on the balance of labels.

    Raises:
        DataError: a limit of `data.audit` is crossed, or a row has more tokens than a model with a
            table of positions can take.
    """
    sides = audit_data(
        data, training_data, held_out, tokenizer, context=context, objective=objective
    )
    for side in sides:
        is_suspect = any(one.is_suspect for one in side.findings if one is not side.beyond)
        log.log(logging.WARNING if is_suspect else logging.DEBUG, side.summary())
    check_limits(data, sides)
    check_context(sides, context)
    return {
        side.name: {
            **side.audit.record(),
            **({} if side.labels is None else {"labels": dict(side.labels)}),
        }
        for side in sides
    }


def check_limits(data: Data, sides: list[AuditedDataset]) -> None:
    """Raise DataError if a limit of `data.audit` is crossed."""
    training, *others = sides
    evaluation = others[0].audit if others else None
    data.audit.check(training.audit, evaluation, truncated=training.truncated)


def check_context(sides: list[AuditedDataset], context: ModelContext | None) -> None:
    """Warn of rows that are longer than the model's context.

    Raises:
        DataError: the model looks positions up in a table, and so cannot compute such a row.
    """
    for side in sides:
        if context is None or side.beyond is None or not side.beyond.count:
            continue
        what = (
            f"{side.name} data: {side.beyond.found} rows are longer than the model's context of "
            f"{context.text}, such as {side.beyond.named[0]}"
        )
        remedy = f"data.max_length={context.length}"
        if context.is_table:
            raise DataError(f"{what}; it has no positions for them", hint=f"--set {remedy}")
        log.warning("%s: it was not trained on such positions; --set %s is safe", what, remedy)


def _audited(
    data: Data,
    tokenizer: PreTrainedTokenizerFast,
    context: ModelContext | None,
    objective: ObjectiveSettings,
    name: str,
    prepared: PreparedData,
    training: AuditedDataset | None,
) -> AuditedDataset:
    rows = prepared.examples
    scanned = scan(rows, tokenizer, max_length=data.max_length)
    audit = scanned.audit(None if training is None else training.scan)
    training_rows = None if training is None else training.prepared.examples
    sources = data.train_sources if training is None else data.evaluation_sources
    prompts = [
        pair
        for i, source in enumerate(sources)
        for pair in _first_prompts(source, rows, _candidates(source, scanned, i), data, tokenizer)
    ]
    cut = Finding("rows longer than data.max_length", prepared.num_truncated, prepared.num_rows)
    has_answers = any(source.format.rows != "labels" for source in sources)
    drift = find_drift(rows, prompts) if has_answers else None
    found = findings(rows, audit, drift, cut, training=training_rows)
    beyond = None
    if context is not None:
        longer = scanned.longer_than(context.length)
        beyond = Finding(
            f"rows beyond the model's context ({context.length:,})",
            len(longer),
            audit.total.num_rows,
            tuple(rows.place(row) for row in longer[:NAMED]),
        )
        found.insert(1, beyond)
    found += [
        Finding(problem, count, prepared.num_rows, tuple(prepared.tool_problem_places[problem]))
        for problem, count in prepared.tool_problems.items()
    ]
    found += pair_findings(rows, audit)
    found += score_findings(
        audit.total.num_pairs,
        prepared.num_scored,
        prepared.num_contradicted,
        tuple(prepared.contradicted_places),
    )
    found += _label_findings(data, prepared, audit, sources, training, objective)
    has_labels = any(source.format.rows in ("feedback", "labels") for source in sources)
    return AuditedDataset(
        name,
        prepared,
        scanned,
        audit,
        found,
        beyond,
        has_answers=has_answers,
        labels=prepared.labels if has_labels else None,
    )


def _label_findings(
    data: Data,
    prepared: PreparedData,
    audit: DatasetStatistics,
    sources: Sequence[Source],
    training: AuditedDataset | None,
    objective: ObjectiveSettings,
) -> Iterator[Finding]:
    rows, labels, num_rows = prepared.examples, prepared.labels, audit.total.num_rows
    if any(source.format.rows in ("feedback", "labels") for source in sources):
        relabelled = tuple(f"{rows.place(a)} = {rows.place(b)}" for a, b in audit.relabelled)
        what = "rows that repeat an earlier one with another label"
        yield Finding(what, audit.total.num_relabelled, num_rows, relabelled)
        if labels:
            yield find_balance(labels, num_rows, objective.label_remark(labels))
    others = training.prepared.labels if training else {}
    section = "data.evaluation" if training and data.evaluation else "data.train"
    variants = find_label_variants(labels, others, sources, section)
    if variants is not None:
        yield variants


def _candidates(source: Source, scanned: DatasetScan, index: int) -> list[int]:
    """Return rows that include those at the beginning of a source's files."""
    return scanned.first_rows(index, None if source.shuffle else _COMPARED)


def _first_prompts(
    source: Source,
    rows: LocatedExamples,
    candidates: list[int],
    data: Data,
    tokenizer: PreTrainedTokenizerFast,
) -> Iterator[tuple[int, list[int]]]:
    """Yield rows that are not cut, with the prompt for generating their last answer."""
    encoder = Encoder(tokenizer)
    for row, conversation in islice(_first_located(source, rows, candidates), _COMPARED):
        has_prompt = any(message.train for message in conversation.messages[1:])
        # A row that was cut has exactly this length.
        is_whole = len(rows[row].input_ids) < data.max_length
        if has_prompt and not conversation.train_on_all and is_whole:
            yield row, encoder.encode_prompt(conversation.messages, conversation.tools)


def _first_located(
    source: Source, rows: LocatedExamples, candidates: list[int]
) -> Iterator[tuple[int, Conversation]]:
    """Yield the first conversations of the files with the row that each became.

    Conversations that became several rows are left out.
    """
    # In file order: with `shuffle`, a whole source is read before its first row.
    conversations = source.in_file_order().conversations(BadRows(tries_repairs=False))
    num_left = len(candidates)
    while num_left > 0 and (some := {one.place: one for one in islice(conversations, _COMPARED)}):
        found = [row for row in candidates if rows.place(row) in some]
        times = Counter(rows.place(row) for row in found)
        for row in found:
            if times[rows.place(row)] == 1:
                yield row, some[rows.place(row)]
        num_left -= len(found)
