"""What the model will see: tokens, masks, lengths, and what in the rows is often a mistake."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_cli._compat import quiet_libraries
from qlora_cli.build import Audited, audit_data, check_limits, read_data
from qlora_cli.data.encode import read_chat_template
from qlora_cli.errors import RecipeError
from qlora_cli.preview_page import preview_page
from qlora_cli.preview_text import preview_text
from qlora_cli.recipe import Recipe
from qlora_cli.view import SideView, SourceView, make_sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def preview(recipe: Recipe, *, source: str | None = None) -> Preview:
    """Prepare the data of a recipe as for training. No weights are opened.

    Args:
        source: show the rows of this source alone (`train.0`), or of one side (`evaluation`).

    Raises:
        QloraError: in one of its kinds, with its exit code.
    """
    quiet_libraries()
    data = recipe.data
    sides = {"train": data.train_sources, "evaluation": data.evaluation_sources}
    names = {side: _names(side, len(sources)) for side, sources in sides.items() if sources}
    known = {**names, **{name: [] for side in names.values() for name in side}}
    if source is not None and source not in known:
        raise RecipeError(f"--source: found {source}; it takes {', '.join(known)}")
    tokenizer = recipe.model.load_tokenizer(read_chat_template(data.chat_template))
    learnt, *held_out = [
        read_data({"train": "training"}.get(side, side), data, sides[side], tokenizer)
        for side in names
    ]
    audited = audit_data(data, learnt, held_out[0] if held_out else None, tokenizer)
    return Preview(recipe, tokenizer, list(zip(names.values(), audited, strict=True)), source)


def _names(side: str, num_sources: int) -> list[str]:
    return [side] if num_sources == 1 else [f"{side}.{i}" for i in range(num_sources)]


@dataclass(frozen=True, slots=True)
class Preview:
    """Prepared data to look at."""

    recipe: Recipe
    tokenizer: PreTrainedTokenizerFast
    sides: list[tuple[list[str], Audited]]
    """Training, then evaluation: the names of its sources, and what was found."""
    source: str | None
    """The one source or side whose rows are shown."""

    def text(self, num_samples: int, *, colour: bool) -> str:
        """Samples, figures and findings for a terminal."""
        return preview_text(self._views(num_samples), colour=colour)

    def write_page(self, path: Path, num_samples: int, *, title: str) -> None:
        """Write the same as one HTML page.

        Raises:
            RecipeError: it cannot be written.
        """
        page = preview_page(self._views(num_samples), title=title)
        try:
            path.write_text(page, encoding="utf-8")
        except OSError as error:
            raise RecipeError(f"--html: {path}: {error.strerror or error}") from error

    def rows(self, num_rows: int | None) -> Iterator[dict[str, Any]]:
        """Rows for programs.

        Args:
            num_rows: of each source; None gives all.
        """
        for names, side in self.sides:
            rows = side.prepared.examples
            for source, name in enumerate(names):
                for row in side.scan.first_rows(source, num_rows) if self._shows(name) else []:
                    example = rows[row]
                    yield {
                        "source": name,
                        "row": rows.place(row),
                        "input_ids": example.input_ids,
                        "labels": example.labels,
                        "text": self.tokenizer.decode(example.input_ids),
                    }

    def check(self) -> None:
        """Raises DataError if `qlora train` would stop because of a limit in `data.audit`."""
        check_limits(self.recipe.data, [side for _, side in self.sides])

    def _shows(self, name: str) -> bool:
        return self.source is None or f"{name}.".startswith(f"{self.source}.")

    def _views(self, num_samples: int) -> list[SideView]:
        return [self._view(names, side, num_samples) for names, side in self.sides]

    def _view(self, names: list[str], side: Audited, num_samples: int) -> SideView:
        rows, prepared, tokenizer = side.prepared.examples, side.prepared, self.tokenizer
        sources = [
            SourceView(
                name=name,
                path=prepared.paths[i],
                num_read=prepared.counts[i]["num_rows"],
                num_bad=prepared.counts[i]["num_bad"],
                num_dropped=prepared.counts[i]["num_lost"],
                num_cut=prepared.counts[i]["num_truncated"],
                figures=side.audit.sources[i],
                samples=[
                    make_sample(rows[row], rows.place(row), tokenizer)
                    for row in (side.scan.first_rows(i, num_samples) if self._shows(name) else [])
                ],
            )
            for i, name in enumerate(names)
        ]
        stops = [
            (str(tokenizer.convert_ids_to_tokens(token_id)), count)
            for token_id, count in side.audit.ends.items()
        ]
        return SideView(side.name, side.audit, stops, side.findings, sources)
