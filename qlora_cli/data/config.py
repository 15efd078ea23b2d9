"""Data: sources -> rows -> messages -> examples -> batches. The section `data` of a recipe."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from qlora_cli.common.config import Config
from qlora_cli.data.formats import Preference
from qlora_cli.data.prepared.findings import AuditLimits
from qlora_cli.data.sources import BadRows, Portion, Source
from qlora_cli.errors import DataError


class Data(Config):
    """What is learnt, and what it is measured on."""

    train: Source | list[Source]
    """Rows to learn from; a list of sources is learnt together."""
    evaluation: Source | list[Source] | None = None
    """Rows held out, never learnt from."""
    evaluation_share: float | None = Field(None, gt=0, lt=1)
    """In place of `evaluation`: the share of the training rows to hold out, drawn by content."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Fixes what `shuffle` and `evaluation_share` draw, whatever seed is trained with."""
    on_bad_row: Literal["stop", "skip"] = "stop"
    """What to do about rows that cannot be used: name the first ten and stop, or go on without."""
    max_length: int = Field(1024, ge=8)
    """Tokens per row."""
    truncate: Literal["drop", "cut_end", "cut_prompt", "split"] = "cut_end"
    """What becomes of a longer row: left out, cut at its end, its prompt cut at the beginning so
    that the answers stay, or (text without roles, else as cut_end) split into several rows."""
    max_lost: float = Field(0.05, ge=0, le=1)
    """Share of the answers that may be lost because they were cut away or cut short; above it,
    stop."""
    workers: int | None = Field(None, ge=1)
    """Processes that prepare rows; null takes one at first, and for a large set all cores if
    there are four or more."""
    packing: bool = False
    """Put several short rows into one of `max_length`, where none sees the others."""
    audit: AuditLimits = AuditLimits()
    """What stops the run because of what is in the rows."""
    chat_template: str | None = None
    """Jinja file to use in place of the tokenizer's own chat template."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        problems = [
            f"{name}: the list is empty"
            for name in ("train", "evaluation")
            if getattr(self, name) == []
        ]
        if self.evaluation is not None and self.evaluation_share is not None:
            problems.append(
                f"evaluation_share ({self.evaluation_share:g}) and evaluation are both given; give "
                "one of them"
            )
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def train_sources(self) -> list[Source]:
        """What is learnt, without the rows that `evaluation_share` holds out."""
        return self._portions(self.train, held_out=False)

    @property
    def evaluation_sources(self) -> list[Source]:
        """What is held out; no source if nothing is."""
        if self.evaluation_share is not None:
            return self._portions(self.train, held_out=True)
        return [] if self.evaluation is None else self._portions(self.evaluation, held_out=True)

    def refuse_untrainable(self) -> None:
        """Raises DataError if a source is in a format that can be read but not trained on."""
        for source in [*self.train_sources, *self.evaluation_sources]:
            if isinstance(source.format, Preference):
                raise DataError(
                    f"{source.path}: preference data is read and previewed, not trained on yet",
                    hint=_chosen_hint(source, source.format),
                )

    def _portions(self, sources: Source | list[Source], *, held_out: bool) -> list[Source]:
        return [
            Portion.of(source, seed=self.seed, share=self.evaluation_share, held_out=held_out)
            for source in (sources if isinstance(sources, list) else [sources])
        ]


def _chosen_hint(source: Source, pairs: Preference) -> str:
    """How the chosen answers of a source are learnt, by what its first row looks like.

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
        return f"to learn the chosen answers alone, give this source format: {{{written}}}"
    return "qlora preview says what is wrong with its rows"
