"""The recipe section that names rows: where they are, which to use, what to train on."""

from __future__ import annotations

import glob
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from qlora_cli.common.config import Config, UserPath
from qlora_cli.common.formatting import value_text
from qlora_cli.common.hashing import hash_pieces
from qlora_cli.common.user_paths import missing_path_hint
from qlora_cli.data.formats import FormatConfig, Labelled, Messages, PromptCompletion
from qlora_cli.data.formats.fields import missing
from qlora_cli.data.formats.proposal import propose_template
from qlora_cli.data.formats.turns import SameRoleError
from qlora_cli.data.sources.files import find_files, is_pattern, is_table, names_a_file, read_file
from qlora_cli.data.sources.hub import hub_rows, is_hub_id
from qlora_cli.data.sources.loss_mask import mark_trained_turns
from qlora_cli.data.sources.repair import Repair, RepairSearch, repaired, why_not_joined
from qlora_cli.data.sources.row_kinds import content_of, refuse_other_kind, refuse_unread_label
from qlora_cli.data.sources.rows import LIST_ALL, TEMPLATE, BadRows, LocatedRow, draw, shuffled
from qlora_cli.errors import DataError
from qlora_cli.types import Conversation, Row


class Source(Config):
    """Rows of one kind, from one place."""

    path: UserPath = Field(min_length=1)
    """File (jsonl, json, csv, tsv, parquet, arrow, txt; or compressed: gz, bz2, xz, zst), folder of
    such files or of datasets' `save_to_disk`, pattern such as `data/**/*.jsonl`, or id of a Hub
    dataset."""
    format: FormatConfig = Messages()
    """The format of the rows."""
    name: str | None = None
    """Configuration of a Hub dataset."""
    split: str = "train"
    """Split of a Hub dataset."""
    revision: str | None = None
    """Commit, tag or branch of a Hub dataset."""
    streaming: bool = False
    """Download a Hub dataset row by row as it is read, instead of storing it on disk first."""
    columns: list[str] | None = Field(None, min_length=1)
    """Column names of a csv or tsv file without a header."""
    delimiter: str | None = None
    """Column delimiter of a csv or tsv file; null takes a comma, or a tab for tsv."""
    fields: dict[str, str] = Field({})
    """Columns to rename before the format reads them: new name -> name in the file."""
    shuffle: bool = False
    """Shuffle the rows by `data.seed` instead of keeping the order of the files."""
    limit: int | None = Field(None, ge=1)
    """Maximum number of rows to use, from the first on."""
    weight: float = Field(1.0, gt=0)
    """How often an epoch sees each row: 2 is twice, 0.5 is every other row. Only for training
    rows; evaluation reads each row once."""
    learn_roles: list[Literal["system", "user", "assistant", "tool"]] = Field(
        ["assistant"], min_length=1
    )
    """Roles whose turns are trained on."""
    learn_turns: Literal["all", "last"] = "all"
    """Train on all turns of these roles, or only on the last one."""
    learn_prompt: bool = False
    """Train on all tokens, including prompts and what the chat template writes."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.columns is not None and len(set(self.columns)) < len(self.columns):
            raise ValueError(f"columns names a column twice: {', '.join(self.columns)}")
        if self.delimiter is not None and (len(self.delimiter) != 1 or self.delimiter in '"\r\n'):
            raise ValueError(
                f"delimiter ({self.delimiter!r}) has to be one character, not a quotation mark or "
                'line break; a tab is written "\\t", in these quotes'
            )
        learns = self.learn_prompt or self.learn_roles != ["assistant"]
        if self.format.rows != "answers" and (learns or self.learn_turns != "all"):
            raise ValueError(
                "learn_prompt, learn_roles and learn_turns are for formats of plain answers; what "
                f"format {self.format.type} trains on is decided by the objective"
            )
        if self.learn_prompt and (self.learn_turns != "all" or self.learn_roles != ["assistant"]):
            raise ValueError(
                "learn_prompt (true) trains on everything; leave out learn_turns and learn_roles"
            )
        return self

    @property
    def rows_are(self) -> str:
        """The word for these rows in messages to the user."""
        return "rows"

    @property
    def title(self) -> str:
        """The path, and which of its rows, in messages to the user."""
        return self.path

    def whole(self) -> Source:
        """Return the source with the rows of all portions."""
        return self

    def conversations(self, bad: BadRows) -> Iterator[Conversation]:
        """Yield the conversation of each row, lazily. Bad rows are added to `bad`.

        Raises:
            DataError: there is nothing at `path`, a file cannot be read any further, a row is of
                another kind than the format reads, or, at the end, no row can be used.
        """
        is_empty, search = True, RepairSearch(self._is_usable)
        for number, located in enumerate(self.read(bad)):
            if number == 0:
                bad.template = self._propose_template(located.row)
            refuse_unread_label(located, self.format)
            try:
                conversation = self._conversation(located.row)
            except DataError as error:
                refuse_other_kind(located, self.format)
                # Without a usable row the error names the repairs.
                tries = bad.tries_repairs or is_empty
                found = search.helpful(located.row) if tries else ()
                reason = str(error)
                if isinstance(error, SameRoleError):
                    reason += why_not_joined(located.row, error, self._own_repairs)
                bad.add(located.place, reason, (*self._own_repairs, *found) if found else ())
            else:
                is_empty = False
                bad.repaired.update(located.repaired)
                yield replace(conversation, place=located.place, repaired=located.repaired)
        if is_empty:
            if bad.count:
                raise self._none_usable(bad)
            raise DataError(f"{self.path}: no rows{self._where()}")

    def unusable(self, bad: BadRows) -> DataError:
        """Return the error for a source without a usable row."""
        hint = f"{bad.remedy('check data.train.format')}; no row can be used as it is"
        if all("(of fields): missing; found" in line for line in bad.first):
            hint = "no row has that column: data.train.fields takes NEW_NAME: NAME_IN_THE_FILE"
        elif all("missing; found" in line for line in bad.first):
            hint = (
                "no row has that field: name the right one in data.train.format, or another format "
                "(messages, sharegpt, alpaca, prompt_completion, text, template, preference, "
                "feedback, labelled), or rename "
                "columns with data.train.fields"
            )
            if bad.template not in (TEMPLATE, ""):
                yours = "text" if self.format.rows == "labels" else "request and answer"
                hint += (
                    f"; a template reads any columns: {bad.template}, with the columns of your "
                    f"{yours}"
                )
            if self.format.rows != "answers":
                hint += "; rows of plain answers are for objective: {type: supervised}"
            if self.columns is None and self._is_local() and any(map(is_table, self._files())):
                hint += "; a file without a header needs data.train.columns, the names in order"
        if bad.has_more and isinstance(self, Portion):
            hint = f"{hint}; {LIST_ALL} writes all of them"
        return DataError(bad.report(self.title), hint=hint)

    def _propose_template(self, row: Row) -> str:
        """Return a template over the columns of a flat row: those of the format, if it has them.

        Pairs and feedback have none: "".
        """
        columns = [name for name, value in row.items() if not isinstance(value, list | dict)]
        if isinstance(self.format, Labelled):
            texts = [name for name in columns if name != self.format.label_field] or ["COLUMN"]
            return f'data.train.format: {{type: labelled, text: "{{{{ {texts[0]} }}}}"}}'
        if self.format.rows != "answers":
            return ""
        if len(columns) < 2 or len(columns) < len(row):
            return TEMPLATE
        if isinstance(self.format, PromptCompletion):
            own = [self.format.prompt_field, self.format.completion_field]
            columns = own if {*own} <= {*columns} else columns
        return propose_template(columns[0], columns[-1], fields=self.fields)

    def read(self, bad: BadRows) -> Iterator[LocatedRow]:
        """Yield the rows in order. What cannot be read as a row is added to `bad`.

        Raises:
            DataError: there is nothing at `path`, or a file cannot be read any further.
        """
        return self._taken(bad, seed=0)

    def is_at_hand(self) -> bool:
        """Return True if the rows can be read without a network."""
        return Path(self.path).exists() or is_pattern(self.path)

    def is_missing(self) -> bool:
        """Return True if `path` is meant to be local and does not exist."""
        if is_pattern(self.path):
            return next(glob.iglob(self.path, recursive=True), None) is None
        if self.is_at_hand():
            return False
        # A missing file, or a name in a folder that exists, is meant to be local: a misspelt path
        # should fail at once and not after a request to the Hub.
        owner, slash, _ = self.path.partition("/")
        is_here = bool(slash) and Path(owner).exists()
        return names_a_file(self.path) or not is_hub_id(self.path) or is_here

    def digest(self) -> str:
        """Hash the files' names and bytes in order, or all rows of a Hub dataset (sha256).

        Raises:
            DataError: there is nothing at `path`.
        """
        if not self._is_local():
            return hash_pieces(
                json.dumps(row, sort_keys=True, default=str).encode() + b"\n"
                for row in self._hub_rows()
            )
        try:
            return hash_pieces(self._named_files())
        except OSError as error:
            place = error.filename or self.path
            raise DataError(f"{place}: cannot be read: {error.strerror or error}") from error

    def _named_files(self) -> Iterator[bytes | Path]:
        for path in self._files():
            # The ending decides how a file is read, and the size where the next file begins.
            name = os.path.relpath(path, self.path)
            yield f"{name} {path.stat().st_size}\n".encode(errors="surrogateescape")
            yield path

    def in_file_order(self) -> Self:
        """Return the source without `shuffle`, so that its first rows are available at once.

        The limit is dropped too, because it would select other rows.
        """
        return self.model_copy(update={"shuffle": False, "limit": None}) if self.shuffle else self

    def refuse_changed(self, digest: str) -> None:
        """Raise DataError if local files no longer have a digest.

        Hub datasets are not read again, because that would be another download.
        """
        if self._is_local() and self.digest() != digest:
            raise DataError(
                f"{self.path}: changed while its rows were read, so old and new rows may be mixed",
                hint="start again when nothing writes to it",
            )

    def _where(self) -> str:
        return ""

    def _taken(self, bad: BadRows, seed: int) -> Iterator[LocatedRow]:
        rows = self._rows(bad)
        if self.fields:
            rows = self._renamed(rows, bad)
        return shuffled(rows, seed, self.limit) if self.shuffle else islice(rows, self.limit)

    def _rows(self, bad: BadRows) -> Iterator[LocatedRow]:
        if self._is_local():
            for path in self._files():
                yield from read_file(path, bad, self.columns, self.delimiter)
            return
        for number, row in enumerate(self._hub_rows(), start=1):
            yield LocatedRow(row, f"{self.path} ({self.split}), row {number}")

    def _renamed(self, rows: Iterator[LocatedRow], bad: BadRows) -> Iterator[LocatedRow]:
        names = self.fields.values()
        for located in rows:
            row = located.row
            if absent := [name for name in names if name not in row]:
                found = missing(absent[0], row)
                bad.add(located.place, f"field '{absent[0]}' (of fields): {found}")
                continue
            kept = {name: value for name, value in row.items() if name not in names}
            renamed = {wanted: row[name] for wanted, name in self.fields.items()}
            yield LocatedRow({**kept, **renamed}, located.place)

    def _conversation(self, row: Row) -> Conversation:
        return self._with_loss_mask(self.format.to_conversation(row))

    def _none_usable(self, bad: BadRows) -> DataError:
        """Return the error for rows of which the format can read none."""
        return self.unusable(bad)

    @property
    def _own_repairs(self) -> Sequence[Repair]:
        """The repairs that are made before the format reads a row."""
        return ()

    def _is_usable(self, row: Row) -> bool:
        try:
            self._conversation(row)
        except DataError:
            return False
        return True

    def _with_loss_mask(self, conversation: Conversation) -> Conversation:
        # The format says what is supervised in an answer that is compared or judged; in a labelled
        # row, nothing is.
        if self.format.rows != "answers":
            return conversation
        if self.learn_prompt:
            return replace(conversation, train_on_all=True)
        roles, last_only = self.learn_roles, self.learn_turns == "last"
        return replace(
            conversation,
            messages=mark_trained_turns(conversation.messages, roles=roles, last_only=last_only),
        )

    def _is_local(self) -> bool:
        """Return True if `path` exists here; otherwise it is the id of a Hub dataset.

        Raises:
            DataError: it is neither.
        """
        if self.is_at_hand():
            return True
        if self.is_missing():
            raise DataError(
                f"{self.path}: no such file or folder", hint=missing_path_hint(self.path)
            )
        return False

    def _files(self) -> list[Path]:
        for setting in ("name", "split", "revision", "streaming"):
            value = getattr(self, setting)
            if value != Source.model_fields[setting].default:
                raise DataError(
                    f"{self.path}: {setting} ({value_text(value)}) is for Hub datasets, and "
                    "this path is local"
                )
        return find_files(self.path)

    def _hub_rows(self) -> Iterator[Row]:
        for setting in ("columns", "delimiter"):
            if getattr(self, setting) is not None:
                raise DataError(
                    f"{self.path}: {setting} is for csv and tsv files, and no such path is here"
                )
        return hub_rows(
            self.path,
            name=self.name,
            split=self.split,
            revision=self.revision,
            streaming=self.streaming,
        )


class Portion(Source):
    """The training rows of a source, or its held-out rows."""

    seed: int
    repair: list[Repair]
    share: float | None
    """Share of the rows that is held out."""
    held_out: bool

    @classmethod
    def of(
        cls,
        source: Source,
        *,
        seed: int,
        share: float | None,
        held_out: bool,
        repair: Sequence[Repair] = (),
    ) -> Portion:
        """Select one portion of a source. Without a share, no rows are held out from it."""
        settings = {name: getattr(source, name) for name in Source.model_fields}
        return cls(**settings, seed=seed, share=share, held_out=held_out, repair=list(repair))

    @property
    def rows_are(self) -> str:
        """The word for these rows in messages to the user."""
        return "held-out rows" if self.held_out else "rows"

    def read(self, bad: BadRows) -> Iterator[LocatedRow]:
        """Yield the rows of this portion in order. What is not a row is added to `bad`."""
        for located in self._taken(self._of_this_portion(bad), self.seed):
            changes: Counter[str] = Counter()
            row = repaired(located.row, self.repair, changes)
            changed = LocatedRow(row, located.place, tuple(changes))
            if self._is_here(changed):
                yield changed

    def whole(self) -> Source:
        """Return the source with the rows of all portions."""
        return self.model_copy(update={"share": None, "held_out": False})

    @property
    def title(self) -> str:
        """The path, and which of its rows, in messages to the user."""
        if self.share is None:
            return self.path
        return f"{self.path} ({'held-out' if self.held_out else 'training'} rows)"

    def _none_usable(self, bad: BadRows) -> DataError:
        if self.share is None:
            return self.unusable(bad)
        try:
            next(self.whole().conversations(BadRows()))
        except DataError as error:
            return error  # it counts the rows of both portions
        return self.unusable(bad)

    @property
    def _own_repairs(self) -> Sequence[Repair]:
        return self.repair

    def _of_this_portion(self, bad: BadRows) -> BadRows:
        """Return a count that adds the rows of this portion to `bad`, and leaves others out."""

        def add(place: str, reason: str) -> None:
            if self._draws(place):
                bad.add(place, reason)

        return bad if self.share is None else BadRows(write=add)

    def _where(self) -> str:
        if self.share is None:
            return ""
        return f" among the share that is {'held out' if self.held_out else 'trained on'}"

    def _is_here(self, located: LocatedRow) -> bool:
        if self.share is None:
            return True
        try:
            content = content_of(self.format.to_conversation(located.row), self.format.rows)
        # Bad rows are in one portion too, and so counted once.
        except DataError:
            content = located.row
        return self._draws(content)

    def _draws(self, content: object) -> bool:
        """Draw by its content if a row is in this portion."""
        assert self.share is not None
        return (draw(content, "held out", self.seed) < self.share) is self.held_out
