"""Preview the prepared data: tokens, masks, lengths, and common mistakes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_cli._compat import quiet_libraries
from qlora_cli.common.formatting import value_text
from qlora_cli.common.html import write_page
from qlora_cli.common.report import ABSENT, Absent, Report
from qlora_cli.data.encode.encoder import Encoder, RefusedRow
from qlora_cli.data.prepared.audit import AuditedDataset, audit_data, check_context, check_limits
from qlora_cli.data.prepared.cache import read_data
from qlora_cli.data.prepared.prepare import PreparedData, ignored_text
from qlora_cli.data.prepared.tally import TooManyLost
from qlora_cli.data.render.chat_template import read_chat_template
from qlora_cli.data.sources import BadRows, Source
from qlora_cli.data.sources.rows import repaired_text
from qlora_cli.errors import DataError, RecipeError
from qlora_cli.inspect.preview_html import preview_page
from qlora_cli.inspect.preview_model import SourceView, SplitView, make_sample
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
    audited = audit_data(data, training, held_out, tokenizer, context=context)
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
    """Which answer of a preference row this is: `chosen` or `rejected`."""
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
                        input_ids=row.example.input_ids,
                        labels=row.example.labels,
                        text=str(self.tokenizer.decode(row.example.input_ids)),
                    )

    def check(self) -> None:
        """Raise DataError if `qlora train` would stop here: at `data.max_lost`, at `data.audit`, or
        at rows that the model has no positions for."""
        for error in self.lost_errors:
            raise error
        audited = [split.audited for split in self.splits]
        check_limits(self.recipe.data, audited)
        check_context(audited, self.context)

    def _rows(self, split: _Split, source: int, num_rows: int | None) -> Iterator[_ShownRow]:
        """Yield the first rows of a source if it is shown; for preferences, both answers."""
        if self.source is not None and self.source not in (split.name, split.names[source]):
            return
        examples = split.audited.prepared.examples
        indices = split.audited.scan.first_rows(source, num_rows)
        places = [examples.place(i) for i in indices]
        rejected = self._rejected(split.sources[source], places)
        for i, place in zip(indices, places, strict=True):
            yield _ShownRow(place, examples[i], "chosen" if place in rejected else None)
            if place in rejected:
                yield _ShownRow(place, rejected[place], "rejected")

    def _rejected(self, source: Source, places: list[str]) -> dict[str, Example]:
        """Return the rejected answers of preference rows, by the location of the row."""
        data, encoder = self.recipe.data, Encoder(self.tokenizer)
        found: dict[str, Example] = {}
        wanted = set(places)
        for row in source.conversations(BadRows(tries_repairs=False)):
            if row.rejected is None or not wanted:
                break
            if row.place in wanted:
                wanted.remove(row.place)
                other = replace(row, messages=row.rejected, rejected=None)
                [encoded] = encoder.encode_rows(
                    [other], max_length=data.max_length, truncate=data.truncate
                )
                if isinstance(encoded, RefusedRow):
                    raise DataError(f"{row.place}: the rejected answer: {encoded.reason}")
                found.update((row.place, example) for example in encoded.examples)
        return found

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
                    make_sample(row.example, row.place, tokenizer, row.answer)
                    for row in self._rows(split, i, num_samples)
                ],
            )
            for i, name in enumerate(split.names)
        ]
        stops = [
            (str(tokenizer.convert_ids_to_tokens(token_id)), count)
            for token_id, count in audited.audit.ends.items()
        ]
        return SplitView(audited.name, audited.audit, stops, audited.findings, sources)


@dataclass(frozen=True, slots=True)
class _ShownRow:
    place: str
    example: Example
    answer: str | None
    """Which answer of a preference row this is."""


@dataclass(frozen=True, slots=True)
class _Split:
    name: str
    names: list[str]
    """Names of its sources in the recipe."""
    sources: list[Source]
    audited: AuditedDataset
