"""Findings in prepared rows that are often mistakes, and the limits that stop a run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from pydantic import Field

from qlora_cli.common.config import Config
from qlora_cli.data.prepared.scan import supervised_turns
from qlora_cli.data.prepared.statistics import (
    NAMED,
    DatasetStatistics,
    LocatedExamples,
    RowStatistics,
)
from qlora_cli.errors import DataError


class AuditLimits(Config):
    """Limits that stop a run because of its data. Without a limit, findings are only reported."""

    max_duplicates: float | None = Field(None, ge=0, le=1)
    """Maximum share of training rows that repeat an earlier one, token by token."""
    max_overlap: float | None = Field(None, ge=0, le=1)
    """Maximum share of evaluation rows that are also training rows, or whose prompt has another
    answer in the training rows."""
    max_truncated: float | None = Field(None, ge=0, le=1)
    """Maximum share of training rows longer than `max_length`."""
    min_learnt: float | None = Field(None, ge=0, le=1)
    """Minimum share of training tokens that are supervised."""
    max_equal_answers: float | None = Field(None, ge=0, le=1)
    """Maximum share of training pairs whose chosen and rejected answers are equal."""

    def check(
        self, training: DatasetStatistics, evaluation: DatasetStatistics | None, *, truncated: float
    ) -> None:
        """Stop if a limit is crossed.

        Args:
            truncated: share of the training rows longer than `max_length`.

        Raises:
            DataError: one or more limits are crossed; all of them are named.
        """
        figures = training.total
        found = [
            ("max_duplicates", figures.num_duplicates / figures.num_rows, "training rows repeat"),
            ("max_truncated", truncated, "training rows are longer than data.max_length"),
            (
                "max_equal_answers",
                figures.num_equal / max(1, figures.num_pairs),
                "training pairs have equal answers",
            ),
        ]
        if evaluation is not None:
            held_out = evaluation.total
            shown = (held_out.num_seen + held_out.num_asked) / held_out.num_rows
            found.append(("max_overlap", shown, "evaluation rows are shown in training"))
        problems = [
            f"data.audit.{key} ({limit:g}): {share:.2%} of the {what}"
            for key, share, what in found
            if (limit := getattr(self, key)) is not None and share > limit
        ]
        if self.min_learnt is not None and figures.supervised_share < self.min_learnt:
            problems.append(
                f"data.audit.min_learnt ({self.min_learnt:g}): {figures.supervised_share:.2%} of "
                "the training tokens are supervised"
            )
        if problems:
            raise DataError("\n".join(problems), hint="qlora preview names the first of these rows")


@dataclass(frozen=True, slots=True)
class TemplateDrift:
    """Rows whose last answer follows a different prompt than at generation."""

    num_rows: int
    """Number of rows compared."""
    rows: list[int]
    """The rows among them that differ."""


@dataclass(frozen=True, slots=True)
class Finding:
    """How many rows (or turns) have one kind of problem."""

    what: str
    count: int
    total: int
    named: tuple[str, ...] = ()
    """The first of them, by place."""
    remedy: tuple[str, ...] = ()
    """The way out, if it is not obvious."""
    num_groups: int | None = None
    """The number of groups, if `named` holds the first groups of rows and not the first rows."""
    is_usual: bool = False
    """The count is nothing unusual: a figure to know, and not a sign of a mistake."""

    @property
    def is_suspect(self) -> bool:
        """There are such rows, and they are often a mistake."""
        return self.count > 0 and not self.is_usual

    def first_named(self, number: int = NAMED) -> tuple[str, ...]:
        """Return the first names, and how many more there are."""
        total = self.count if self.num_groups is None else self.num_groups
        shown = self.named[:number]
        more = total - len(shown)
        return (*shown, f"and {more:,} more") if shown and more > 0 else shown

    @property
    def found(self) -> str:
        """The count, the total, and the share unless it is zero."""
        share = f" ({self.count / self.total:.2%})" if self.count else ""
        return f"{self.count:,} of {self.total:,}{share}"


def findings(
    rows: LocatedExamples,
    audit: DatasetStatistics,
    drift: TemplateDrift | None,
    cut: Finding,
    *,
    training: LocatedExamples | None = None,
) -> list[Finding]:
    """List the findings in training or evaluation rows.

    Args:
        drift: None for rows without answers, which have labels instead.
        cut: the finding about rows that are too long.
        training: the training rows, if `rows` are evaluation rows.
    """
    total = audit.total

    def pairs(found: list[tuple[int, int]], others: LocatedExamples = rows) -> tuple[str, ...]:
        return tuple(f"{rows.place(row)} = {others.place(other)}" for row, other in found)

    num = total.num_rows
    repeated = pairs(audit.duplicates)
    found = [
        cut,
        Finding("rows with nothing to learn", total.num_empty, num),
        *([] if drift is None else _turn_findings(rows, total, drift)),
        Finding("rows that begin with two BOS tokens", total.num_double_bos, num),
        Finding("rows that repeat an earlier one", total.num_duplicates, num, repeated),
    ]
    if training is not None:
        seen, asked = pairs(audit.seen, training), pairs(audit.asked, training)
        found += [
            Finding("rows that training has too", total.num_seen, num, seen),
            Finding("rows whose prompt training answers otherwise", total.num_asked, num, asked),
        ]
    return found


def _turn_findings(
    rows: LocatedExamples, total: RowStatistics, drift: TemplateDrift
) -> Iterator[Finding]:
    if total.num_unfinished:
        yield Finding("turns that do not end in their row", total.num_unfinished, total.num_turns)
    yield Finding("turns that end in no stop token", total.unstopped, total.num_turns)
    drifting = tuple(rows.place(row) for row in drift.rows[:NAMED])
    what = "rows whose prompt differs in generation"
    yield Finding(what, len(drift.rows), drift.num_rows, drifting)


MIN_PAIRS = 20
"""Pairs whose answers differ in length, for their share to say anything."""
USUAL_LONGER = (0.3, 0.7)
"""Usual share of pairs whose longer answer is the chosen one."""


def pair_findings(rows: LocatedExamples, audit: DatasetStatistics) -> list[Finding]:
    """List the findings in pairs of answers; none for other rows."""
    total = audit.total
    if not total.num_pairs:
        return []
    uneven = total.num_longer_chosen + total.num_longer_rejected
    low, high = USUAL_LONGER
    share = total.num_longer_chosen / max(1, uneven)
    is_usual = uneven < MIN_PAIRS or low <= share <= high
    which = "longer" if share > high else "shorter"
    swapped = tuple(f"{rows.place(row)} = {rows.place(other)}" for row, other in audit.swapped)
    return [
        Finding(
            "pairs with equal answers",
            total.num_equal,
            total.num_pairs,
            tuple(rows.place(row) for row in audit.equal),
        ),
        Finding(
            "pairs that an earlier one has the other way round",
            total.num_swapped,
            total.num_pairs,
            swapped,
        ),
        Finding(
            "uneven pairs whose longer answer is chosen",
            total.num_longer_chosen,
            uneven,
            remedy=()
            if is_usual
            else (
                f"the model may learn to prefer {which} answers: add pairs whose {which} answer is "
                "rejected",
            ),
            is_usual=is_usual,
        ),
    ]


def score_findings(
    num_pairs: int, num_scored: int, num_contradicted: int, contradicted: tuple[str, ...]
) -> list[Finding]:
    """List the findings in the scores of pairs; none if no pair has scores."""
    if not num_scored:
        return []
    return [
        Finding(
            "pairs whose rejected answer has the higher score",
            num_contradicted,
            num_scored,
            contradicted,
        ),
        Finding("pairs without scores, where others have them", num_pairs - num_scored, num_pairs),
    ]


def find_drift(rows: LocatedExamples, prompts: Iterable[tuple[int, list[int]]]) -> TemplateDrift:
    """Compare rows with the prompts that the model is given to generate their last answer.

    Args:
        prompts: the index of a row that is not cut, and the tokens of its prompt.
    """
    looked_at, drifting = 0, []
    for row, prompt in prompts:
        example = rows[row]
        turns = supervised_turns(example.labels)
        looked_at += 1
        if not turns or turns[-1][0] != len(prompt) or example.input_ids[: len(prompt)] != prompt:
            drifting.append(row)
    return TemplateDrift(looked_at, drifting)
