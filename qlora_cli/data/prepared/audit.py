"""Audit the training and evaluation rows of a run: statistics, findings, limits."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from qlora_cli.data.config import Data
from qlora_cli.data.encode.encoder import Encoder
from qlora_cli.data.prepared.findings import Finding, find_drift, findings
from qlora_cli.data.prepared.prepare import PreparedData
from qlora_cli.data.prepared.statistics import DatasetScan, DatasetStatistics, LocatedExamples, scan
from qlora_cli.data.sources import BadRows, Source
from qlora_cli.types import Conversation

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

    @property
    def truncated(self) -> float:
        """Share of rows longer than `data.max_length`."""
        return self.prepared.num_truncated / self.prepared.num_rows

    def summary(self) -> str:
        """Summarize the audit in one line for the log."""
        total = self.audit.total
        found = "; ".join(
            f"{finding.what}: {', '.join([finding.found, *finding.named[:1]])}"
            for finding in self.findings
            if finding.count
        )
        return (
            f"audit of {self.name} data: {total.shortest:,} to {total.longest:,} tokens a row, "
            f"median {total.median:,}; {found or 'nothing suspicious'}"
        )


def audit_data(
    data: Data,
    training_data: PreparedData,
    held_out: PreparedData | None,
    tokenizer: PreTrainedTokenizerFast,
) -> list[AuditedDataset]:
    """Audit the training rows, then the evaluation rows."""
    training = _audited("training", data, training_data, tokenizer, None)
    if held_out is None:
        return [training]
    return [training, _audited("evaluation", data, held_out, tokenizer, training)]


def check_data(
    data: Data,
    training_data: PreparedData,
    held_out: PreparedData | None,
    tokenizer: PreTrainedTokenizerFast,
) -> dict[str, dict[str, Any]]:
    """Audit the rows, log a line about each dataset, and return the statistics.

    Raises:
        DataError: a limit of `data.audit` is crossed.
    """
    sides = audit_data(data, training_data, held_out, tokenizer)
    for side in sides:
        is_suspect = any(finding.count for finding in side.findings)
        log.log(logging.WARNING if is_suspect else logging.INFO, side.summary())
    check_limits(data, sides)
    return {side.name: side.audit.record() for side in sides}


def check_limits(data: Data, sides: list[AuditedDataset]) -> None:
    """Raise DataError if a limit of `data.audit` is crossed."""
    training, *others = sides
    evaluation = others[0].audit if others else None
    data.audit.check(training.audit, evaluation, truncated=training.truncated)


def _audited(
    name: str,
    data: Data,
    prepared: PreparedData,
    tokenizer: PreTrainedTokenizerFast,
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
    found = findings(rows, audit, find_drift(rows, prompts), cut, training=training_rows)
    return AuditedDataset(name, prepared, scanned, audit, found)


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
            prompt = encoder.to_prompt(conversation.messages, conversation.tools)
            yield row, prompt.input_ids


def _first_located(
    source: Source, rows: LocatedExamples, candidates: list[int]
) -> Iterator[tuple[int, Conversation]]:
    """Yield the first conversations of the files with the row that each became.

    Conversations that became several rows are left out.
    """
    # In file order: with `shuffle`, a whole source is read before its first row.
    conversations = source.in_file_order().conversations(BadRows())
    num_left = len(candidates)
    while num_left > 0 and (some := {one.place: one for one in islice(conversations, _COMPARED)}):
        found = [row for row in candidates if rows.place(row) in some]
        times = Counter(rows.place(row) for row in found)
        for row in found:
            if times[rows.place(row)] == 1:
                yield row, some[rows.place(row)]
        num_left -= len(found)
