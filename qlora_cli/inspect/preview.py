"""Preview the prepared data: tokens, masks, lengths, and common mistakes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_cli._compat import quiet_libraries
from qlora_cli.common.formatting import value_text
from qlora_cli.common.html import write_page
from qlora_cli.common.report import ABSENT, Absent, Report
from qlora_cli.data.prepared.audit import AuditedDataset, audit_data, check_context, check_limits
from qlora_cli.data.prepared.cache import read_data
from qlora_cli.data.prepared.prepare import PreparedData, ignored_text
from qlora_cli.data.prepared.tally import TooManyLost
from qlora_cli.data.render.chat_template import read_chat_template
from qlora_cli.data.sources import Source
from qlora_cli.data.sources.rows import repaired_text
from qlora_cli.errors import RecipeError
from qlora_cli.inspect.preview_html import preview_page
from qlora_cli.inspect.preview_model import SourceView, SplitView, make_sample, num_shared
from qlora_cli.inspect.preview_text import preview_text
from qlora_cli.loop.run_data import check_tokens
from qlora_cli.recipe.schema import Recipe
from qlora_cli.types import Example, ModelContext

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def preview(recipe: Recipe, *, source: str | None = None, use_cache: bool = True) -> Preview:
    """Prepare the data of a recipe as for training. No weights are loaded.

    Args:
        source: show only the rows of this source (`train.0`) or of one split (`evaluation`).
        use_cache: store the prepared data, and reuse data that is already stored.

    Raises:
        QloraError: the source does not exist, or the data cannot be prepared.
    """
    quiet_libraries()
    data = recipe.data
    sources = {"train": data.train_sources, "evaluation": data.evaluation_sources}
    names = {split: _names(split, len(some)) for split, some in sources.items() if some}
    known = dict.fromkeys([*names, *(name for split in names.values() for name in split)])
    if source is not None and source not in known:
        raise RecipeError(f"--source: found {value_text(source)}; choose from {', '.join(known)}")
    tokenizer = recipe.model.load_tokenizer(read_chat_template(data.chat_template))
    context = recipe.model.read_context(recipe.adapter.virtual_tokens)
    lost_errors: list[TooManyLost] = []
    read_rows = partial(read_data, use_cache=use_cache, context=context, objective=recipe.objective)

    def read(name: str, some: list[Source]) -> PreparedData:
        try:
            return read_rows(name, data, some, tokenizer)
        except TooManyLost as error:
            # Show the data anyway, so that the user sees why. This raises again if no row is left.
            lost_errors.append(error)
            tolerant = data.model_copy(update={"max_lost": 1.0})
            return read_rows(name, tolerant, some, tokenizer)

    training = read("training", sources["train"])
    held_out = None
    if found := sources["evaluation"]:
        held_out = read("evaluation", found)
    check_tokens(recipe, tokenizer, [training, *([held_out] if held_out else [])])
    audited = audit_data(
        data, training, held_out, tokenizer, context=context, objective=recipe.objective
    )
    splits = [
        _Split(split, names[split], sources[split], result)
        for split, result in zip(names, audited, strict=True)
    ]
    return Preview(recipe, tokenizer, splits, source, lost_errors, context)


def _names(split: str, num_sources: int) -> list[str]:
    return [split] if num_sources == 1 else [f"{split}.{i}" for i in range(num_sources)]


@dataclass(frozen=True, slots=True)
class PreviewRow(Report):
    """One row of the prepared data. `qlora preview --json` prints one object per line."""

    source: str
    """The source: `train` or `evaluation`, or `train.0` in a list."""
    row: str
    """Location of the row, such as `rows.jsonl:17`."""
    answer: str | Absent
    """The answer of a pair: `chosen` or `rejected`."""
    num_shared: int | Absent
    """In a pair: number of tokens at the beginning that both answers have, with their prompt."""
    label: str | Absent
    """The label that the objective learns from: `good` or `bad` for feedback."""
    input_ids: list[int]
    """Token ids."""
    labels: list[int]
    """Token ids where the model is supervised, else -100."""
    text: str
    """The tokens as text."""


@dataclass(frozen=True, slots=True)
class Preview:
    """Prepared data, ready to be shown."""

    recipe: Recipe
    tokenizer: PreTrainedTokenizerFast
    splits: list[_Split]
    """Training data, then evaluation data."""
    source: str | None
    """The only source or split whose rows are shown."""
    lost_errors: list[TooManyLost]
    """Splits that lose more than `data.max_lost` allows."""
    context: ModelContext | None
    """The positions that the model was made for, if its config says so."""

    def text(self, num_samples: int, *, colour: bool) -> str:
        """Format samples, statistics and findings for a terminal."""
        return preview_text(self.views(num_samples), colour=colour)

    def write_page(self, path: Path, num_samples: int, *, title: str) -> None:
        """Write the same as one HTML page.

        Raises:
            RecipeError: it cannot be written.
        """
        write_page(path, preview_page(self.views(num_samples), title=title))

    def rows(self, num_rows: int | None) -> Iterator[PreviewRow]:
        """Yield rows for programs.

        Args:
            num_rows: rows of each source; None yields all.
        """
        for split in self.splits:
            for source in range(len(split.names)):
                for row in self._rows(split, source, num_rows):
                    yield PreviewRow(
                        source=split.names[source],
                        row=row.place,
                        answer=row.answer or ABSENT,
                        num_shared=ABSENT if row.num_shared is None else row.num_shared,
                        label=ABSENT if row.label is None else row.label,
                        input_ids=row.example.input_ids,
                        labels=row.example.labels,
                        text=str(self.tokenizer.decode(row.example.input_ids)),
                    )

    def check(self) -> None:
        """Raise DataError if `qlora train` would stop here: at rows of another kind than the
        objective needs, at `data.max_lost`, at `data.audit`, or at rows that the model has no
        positions for."""
        self.recipe.data.require_rows(self.recipe.objective)
        for error in self.lost_errors:
            raise error
        audited = [split.audited for split in self.splits]
        check_limits(self.recipe.data, audited)
        check_context(audited, self.context)

    def _rows(self, split: _Split, source: int, num_rows: int | None) -> Iterator[_ShownRow]:
        """Yield the first rows of a source if it is shown; of a pair, both answers."""
        if self.source is not None and self.source not in (split.name, split.names[source]):
            return
        examples = split.audited.prepared.examples
        for first in split.audited.scan.first_rows(source, num_rows):
            place, example = examples.place(first), examples[first]
            label = self.recipe.objective.label_text(example.values)
            if first + 1 == len(examples) or not examples.is_linked[first + 1]:
                yield _ShownRow(place, example, label=label)
                continue
            rejected = examples[first + 1]
            shared = num_shared(example.input_ids, rejected.input_ids)
            yield _ShownRow(place, example, "chosen", shared, label)
            yield _ShownRow(place, rejected, "rejected", shared, label)

    def views(self, num_samples: int) -> list[SplitView]:
        """Return statistics and findings of each split, and the first rows of each source."""
        return [self._view(split, num_samples) for split in self.splits]

    def _view(self, split: _Split, num_samples: int) -> SplitView:
        audited, tokenizer = split.audited, self.tokenizer
        prepared = audited.prepared
        sources = [
            SourceView(
                name=name,
                path=prepared.paths[i],
                num_read=prepared.counts[i]["num_rows"],
                num_bad=prepared.counts[i]["num_bad"],
                num_swallowed=prepared.counts[i]["num_swallowed"],
                num_dropped=prepared.counts[i]["num_lost"],
                num_cut=prepared.counts[i]["num_truncated"],
                ignored=ignored_text(prepared.ignored[i]),
                repaired=repaired_text(prepared.repaired[i]),
                figures=audited.audit.sources[i],
                samples=[
                    make_sample(
                        row.example,
                        row.place,
                        tokenizer,
                        answer=row.answer,
                        num_shared=row.num_shared,
                        label=row.label,
                    )
                    for row in self._rows(split, i, num_samples)
                ],
            )
            for i, name in enumerate(split.names)
        ]
        stops = [
            (str(tokenizer.convert_ids_to_tokens(token_id)), count)
            for token_id, count in audited.audit.ends.items()
        ]
        return SplitView(
            audited.name,
            audited.audit,
            stops,
            audited.findings,
            sources,
            has_answers=audited.has_answers,
        )


@dataclass(frozen=True, slots=True)
class _ShownRow:
    place: str
    example: Example
    answer: str | None = None
    """The answer of a pair: `chosen` or `rejected`."""
    num_shared: int | None = None
    """Tokens at the beginning of both answers of a pair."""
    label: str | None = None


@dataclass(frozen=True, slots=True)
class _Split:
    name: str
    names: list[str]
    """Names of its sources in the recipe."""
    sources: list[Source]
    audited: AuditedDataset
