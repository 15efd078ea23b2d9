"""The recipe section `data`: sources -> rows -> conversations -> examples -> batches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Self

from pydantic import Field, model_validator

from qlora_cli.common.config import Config, UserPath
from qlora_cli.data.formats import Preference
from qlora_cli.data.prepared.findings import AuditLimits
from qlora_cli.data.sources import BadRows, Portion, Source
from qlora_cli.data.sources.repair import Repair
from qlora_cli.errors import DataError
from qlora_cli.objectives.settings import ObjectiveSettings
from qlora_cli.types import RowKind


class Data(Config):
    """The training rows and the evaluation rows."""

    train: Source | list[Source]
    """Training rows; a list of sources is mixed."""
    evaluation: Source | list[Source] | None = None
    """Evaluation rows, never trained on."""
    evaluation_share: float | None = Field(None, gt=0, lt=1)
    """Share of the training rows to hold out instead of `evaluation`, drawn by content: of pairs
    and feedback, by the prompt."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Seed of `shuffle` and `evaluation_share`, independent of the training seed."""
    on_bad_row: Literal["stop", "skip"] = "stop"
    """Action for rows that cannot be used: count them by reason and stop, or skip them."""
    repair: list[Repair] = Field([])
    """Repairs of conversations, each counted: `parse_json_strings` (turns given as JSON text),
    `role_names` (`Human`, `model`, `bot` ...), `merge_same_role` (joins consecutive turns of one
    role with an empty line), `drop_trailing_user` (a last question without an answer)."""
    max_length: int = Field(1024, ge=8)
    """Maximum tokens per row."""
    truncate: Literal["drop", "cut_end", "cut_prompt", "split"] = "cut_end"
    """Action for a longer row: leave it out, cut its end, cut the beginning of its prompt so
    that the answers stay, or split it into several rows (text without roles; else as cut_end)."""
    max_lost: float = Field(0.05, ge=0, le=1)
    """Maximum share of answers that may be cut, in whole or in part, or of pairs that are left out
    because of it; with more, stop."""
    workers: int | None = Field(None, ge=1)
    """Processes that prepare rows; null starts with one, and uses all cores for large data if
    there are four or more."""
    packing: bool = False
    """Put several short rows into one of `max_length`; none can attend to the others."""
    audit: AuditLimits = AuditLimits()
    """Limits on the content of the rows that stop the run."""
    chat_template: UserPath | None = None
    """Jinja file to use instead of the tokenizer's chat template."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        problems = [
            f"{name}: the list is empty"
            for name in ("train", "evaluation")
            if getattr(self, name) == []
        ]
        if self.evaluation is not None and self.evaluation_share is not None:
            problems.append(
                f"evaluation_share ({self.evaluation_share:g}) and evaluation are both given; "
                "remove one of them, e.g. --set data.evaluation=null"
            )
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def train_sources(self) -> list[Source]:
        """The training sources, without the rows that `evaluation_share` holds out."""
        return self._portions(self.train, held_out=False)

    @property
    def evaluation_sources(self) -> list[Source]:
        """The evaluation sources; [] if there are none."""
        if self.evaluation_share is not None:
            return self._portions(self.train, held_out=True)
        return [] if self.evaluation is None else self._portions(self.evaluation, held_out=True)

    def task_source(self, source: Source) -> Source:
        """Return the rows of an evaluation task, with `repair` applied. None are held out."""
        if not self.repair:
            return source
        return Portion.of(source, seed=0, share=None, held_out=False, repair=self.repair)

    def require_rows(self, objective: ObjectiveSettings, *, opens_files: bool = True) -> None:
        """Raise DataError if a source has another kind of rows than the objective learns from.

        Args:
            opens_files: read the first row of pairs, to say how the chosen answers are trained on.
        """
        for source in [*self.train_sources, *self.evaluation_sources]:
            kind = source.format.rows
            if kind == objective.rows:
                continue
            other = (
                f"or give the source a format that reads {_ROWS[objective.rows]}"
                f"{_FORMATS[objective.rows]}"
            )
            can_read = opens_files and source.is_at_hand()
            if can_read and isinstance(source.format, Preference) and objective.rows == "answers":
                other = _chosen_hint(source, source.format)
            raise DataError(
                f"{source.path}: format.type ({source.format.type}) reads {_ROWS[kind]}, but "
                f"objective.type ({objective.type}) learns from {_ROWS[objective.rows]}",
                hint=f"objective: {{type: {_OBJECTIVES[kind]}}} learns from such rows; {other}",
            )

    def _portions(self, sources: Source | list[Source], *, held_out: bool) -> list[Source]:
        return [
            Portion.of(
                source,
                seed=self.seed,
                share=self.evaluation_share,
                held_out=held_out,
                repair=self.repair,
            )
            for source in (sources if isinstance(sources, list) else [sources])
        ]


_ROWS: Mapping[RowKind, str] = {
    "answers": "answers",
    "pairs": "pairs of a chosen and a rejected answer",
    "feedback": "answers marked as good or bad",
    "labels": "texts with labels",
}
_OBJECTIVES: Mapping[RowKind, str] = {
    "answers": "supervised",
    "pairs": "dpo",
    "feedback": "kto",
    "labels": "classify",
}
_FORMATS: Mapping[RowKind, str] = {
    "answers": "",
    "pairs": ": {type: preference}",
    "feedback": ": {type: feedback}",
    "labels": ": {type: labelled}",
}


def _chosen_hint(source: Source, pairs: Preference) -> str:
    """Say how to train on the chosen answers alone, based on the first row.

    Raises:
        DataError: there is nothing to read.
    """
    for located in source.read(BadRows()):
        try:
            pairs.to_conversation(located.row)
        except DataError:
            continue
        settings = pairs.as_trainable(located.row).items()
        written = ", ".join(f"{name}: {value}" for name, value in settings)
        return f"to train on the chosen answers alone, give this source format: {{{written}}}"
    return "qlora preview shows what is wrong with its rows"
