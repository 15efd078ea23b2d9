"""Where rows come from: local files and hub data sets."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from qlora_cli.data.formats import FormatConfig, Messages
from qlora_cli.errors import DataError
from qlora_cli.part import Part
from qlora_cli.types import Conversation, Row

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger("qlora")

_SHOWN = 10


@dataclass(frozen=True, slots=True)
class LocatedRow:
    """A row and where it was read."""

    row: Row
    place: str
    """For messages to the user: `train.jsonl:17`, or `train.parquet, row 17`."""


class BadRows:
    """Rows that cannot be used: all are counted, the first are kept so that the user sees them."""

    def __init__(self, *, keep: int = _SHOWN) -> None:
        self.count = 0
        self.first: list[str] = []
        """What is wrong with the first of them, with the place of each."""
        self._keep = keep

    def add(self, place: str, reason: object) -> None:
        self.count += 1
        if len(self.first) < self._keep:
            self.first.append(f"{place}: {reason}")

    def check(self, path: str, *, skip: bool = False) -> None:
        """Report the bad rows, if there are any: their number and the first ten.

        Args:
            skip: warn of them in the log, in place of raising.

        Raises:
            DataError: there are bad rows.
        """
        if not self.count:
            return
        rows = "row" if self.count == 1 else "rows"
        message = f"{path}: {self.count:,} bad {rows}"
        shown = first_lines(self.first, self.count)
        if skip:
            log.warning("%s, left out\n%s", message, shown)
            return
        raise DataError(
            f"{message}\n{shown}",
            hint="repair them, or leave them out with data.on_bad_row: skip",
        )


def first_lines(lines: list[str], count: int | None = None) -> str:
    """The first ten lines, indented, and how many there are beyond them.

    Args:
        count: how many there are in all, if `lines` are but the first.
    """
    shown = [f"  {line}" for line in lines[:_SHOWN]]
    more = (len(lines) if count is None else count) - len(shown)
    if more:
        shown.append(f"  ... and {more:,} more")
    return "\n".join(shown)


class Source(Part):
    """Rows of one kind."""

    path: str = Field(min_length=1)
    """File (jsonl, json, csv, tsv, parquet, txt), folder of such files, or id of a hub data set."""
    format: FormatConfig = Messages()
    """How a row becomes messages."""
    split: str = "train"
    """Split of a hub data set."""
    revision: str | None = None
    """Commit, tag or branch of a hub data set."""
    limit: int | None = Field(None, ge=1)
    """Use only the first rows."""

    def conversations(self, bad: BadRows) -> Iterator[Conversation]:
        """The messages of each row, read as they are asked for; what is wrong is added to `bad`.

        Raises:
            DataError: nothing to read at `path`, a file that cannot be read on, or, at the end,
                not one row that can be used.
        """
        is_empty = True
        for located in self.read(bad):
            try:
                conversation = self.format.to_conversation(located.row)
            except DataError as error:
                bad.add(located.place, error)
            else:
                is_empty = False
                yield replace(conversation, place=located.place)
        if is_empty:
            bad.check(self.path)
            raise DataError(f"{self.path}: no rows")

    def read(self, bad: BadRows) -> Iterator[LocatedRow]:
        """The rows in order; what cannot be read as a row is added to `bad`.

        Raises:
            DataError: nothing to read at `path`, or a file that cannot be read on.
        """
        return islice(self._rows(bad), self.limit)

    def digest(self) -> str:
        """sha256 of the files' bytes in order; of id, split, revision and rows for a hub data set.

        Raises:
            DataError: nothing to read at `path`.
        """
        if not self._is_local():
            return self._hub_digest()
        digest = hashlib.sha256()
        for path in self._files():
            with _reading(path), path.open("rb") as file:
                while block := file.read(2**20):
                    digest.update(block)
        return digest.hexdigest()

    def _rows(self, bad: BadRows) -> Iterator[LocatedRow]:
        if not self._is_local():
            yield from self._hub_rows()
            return
        for path in self._files():
            with _reading(path):
                yield from _READERS[path.suffix.lower()](path, bad)

    def _is_local(self) -> bool:
        """Whether `path` is here; if not, it is the id of a hub data set.

        Raises:
            DataError: it is not here, and it is no id either.
        """
        if Path(self.path).exists():
            return True
        # A file that is missing, and a name in a folder that is here, are meant to be local: a
        # misspelt path should fail at once and not after the hub has been asked.
        is_file = not _READERS.keys().isdisjoint(map(str.lower, Path(self.path).suffixes))
        owner, slash, _ = self.path.partition("/")
        if is_file or not _HUB_ID.fullmatch(self.path) or (slash and Path(owner).exists()):
            raise DataError(
                f"{self.path}: no such file or folder",
                hint=f"a relative path starts at the current folder, {Path.cwd()}",
            )
        return False

    def _files(self) -> list[Path]:
        path = Path(self.path)
        if self.revision is not None or self.split != "train":
            raise DataError(
                f"{self.path}: split ({self.split}) and revision ({self.revision}) are for hub "
                "data sets, and this path is local"
            )
        if not path.is_dir():
            return _known([path], self.path)
        inside = sorted(child for child in path.iterdir() if child.is_file())
        files = [child for child in inside if child.suffix.lower() in _READERS]
        if left_out := [child.name for child in inside if child not in files]:
            log.info("%s: left out %s", self.path, ", ".join(left_out))
        return _known(files, self.path)

    def _hub_rows(self) -> Iterator[LocatedRow]:
        for number, row in enumerate(self._hub_dataset(), start=1):
            yield LocatedRow(row, f"{self.path} ({self.split}), row {number}")

    def _hub_digest(self) -> str:
        digest = hashlib.sha256(f"{self.path} {self.split} {self.revision}\n".encode())
        for row in self._hub_dataset():
            digest.update(json.dumps(row, sort_keys=True, default=repr).encode() + b"\n")
        return digest.hexdigest()

    def _hub_dataset(self) -> Dataset:
        import datasets

        try:
            return datasets.load_dataset(self.path, split=self.split, revision=self.revision)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise DataError(
                f"{self.path}: no such file or folder, and the hub data set of that name (split "
                f"{self.split}, revision {self.revision}) cannot be loaded: {error}",
                hint="check the path, the split and the network; a local copy needs no network",
            ) from error


class Portion(Source):
    """The rows of a source that are learnt, or those that are held out."""

    seed: int
    share: float | None
    """Of the rows, held out."""
    held_out: bool

    @classmethod
    def of(cls, source: Source, *, seed: int, share: float | None, held_out: bool) -> Portion:
        """One side of a source. Without a share, nothing of it is held out from itself."""
        settings = {name: getattr(source, name) for name in Source.model_fields}
        return cls(**settings, seed=seed, share=share, held_out=held_out)

    def read(self, bad: BadRows) -> Iterator[LocatedRow]:
        """The rows on this side, in order; what cannot be read as a row is added to `bad`."""
        rows = super().read(bad)
        return rows if self.share is None else filter(self._is_here, rows)

    def _is_here(self, located: LocatedRow) -> bool:
        assert self.share is not None
        return (draw(located.row, "held out", self.seed) < self.share) is self.held_out


def draw(row: Row, purpose: str, seed: int) -> float:
    """A number in [0, 1) that depends on what a row says and on nothing else about it."""
    content = json.dumps(row, sort_keys=True, default=str)
    digest = hashlib.blake2b(f"{purpose} {seed} {content}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) / 2**64


_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def _known(files: list[Path], path: str) -> list[Path]:
    unknown = [file for file in files if file.suffix.lower() not in _READERS]
    if unknown or not files:
        found = ", ".join(file.name for file in unknown) or "none"
        raise DataError(f"{path}: no data file; found {found}, expected {', '.join(_READERS)}")
    return files


def _read_jsonl(path: Path, bad: BadRows) -> Iterator[LocatedRow]:
    for place, line in _lines(path, bad):
        try:
            row = _object(_parse(line))
        except json.JSONDecodeError as error:
            bad.add(place, _not_json(error))
        except ValueError as error:
            bad.add(place, error)
        else:
            yield LocatedRow(row, place)


def _read_text(path: Path, bad: BadRows) -> Iterator[LocatedRow]:
    for place, line in _lines(path, bad):
        yield LocatedRow({"text": line}, place)


def _read_json(path: Path, bad: BadRows) -> Iterator[LocatedRow]:
    try:
        rows = _only_list(_parse(_decoded(path)))
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}:{error.lineno}: {_not_json(error)}",
            hint="a file with one object per line is named .jsonl",
        ) from error
    except ValueError as error:
        raise DataError(f"{path}: {error}") from error
    for number, row in enumerate(rows, start=1):
        place = f"{path}, row {number}"
        try:
            yield LocatedRow(_object(row), place)
        except ValueError as error:
            bad.add(place, error)


def _read_csv(path: Path, bad: BadRows) -> Iterator[LocatedRow]:
    return _table(path, bad, delimiter=",", quoting=csv.QUOTE_MINIMAL)


def _read_tsv(path: Path, bad: BadRows) -> Iterator[LocatedRow]:
    # text/tab-separated-values has no quoting, and texts that begin with a quotation mark are
    # common: read as quoting, one of them would swallow the lines up to the next.
    return _table(path, bad, delimiter="\t", quoting=csv.QUOTE_NONE)


def _read_parquet(path: Path, bad: BadRows) -> Iterator[LocatedRow]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield LocatedRow(row, f"{path}, row {number}")
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not a readable Parquet file: {error}") from error


_READERS: dict[str, Callable[[Path, BadRows], Iterator[LocatedRow]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
    ".txt": _read_text,
}


def _lines(path: Path, bad: BadRows) -> Iterator[tuple[str, str]]:
    """Each line that is not blank, with its place."""
    # Split as bytes: str.splitlines would also split at the line separators that JSON strings
    # may hold, and one badly encoded line must not take the rest of the file with it.
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            place = f"{path}:{number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                bad.add(place, _not_utf8(error))
                continue
            if text.strip():
                yield place, text


def _table(path: Path, bad: BadRows, *, delimiter: str, quoting: int) -> Iterator[LocatedRow]:
    # The default limit of 128 KiB a field is short for documents.
    csv.field_size_limit(2**31 - 1)
    lines = io.StringIO(_decoded(path), newline="")
    reader = csv.reader(lines, delimiter=delimiter, quoting=quoting, strict=True)  # type: ignore[arg-type]
    header: list[str] | None = None
    while True:
        place = f"{path}:{reader.line_num + 1}"
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            bad.add(place, f"not {path.suffix[1:].upper()}: {error}")
            continue
        if header is None:
            header = _header(values, place)
        elif values and len(values) != len(header):
            bad.add(place, f"{len(values)} fields, but the header has {len(header)}")
        elif values:
            yield LocatedRow(dict(zip(header, values, strict=True)), place)


def _header(names: list[str], place: str) -> list[str]:
    if len(set(names)) < len(names):
        raise DataError(f"{place}: the header names a column twice: {', '.join(names)}")
    return names


def _decoded(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}:{line}: {_not_utf8(error)}", hint="save the file as UTF-8"
        ) from error


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"not UTF-8: byte 0x{error.object[error.start]:02x} ({error.reason})"


def _parse(text: str) -> Any:
    """The JSON value; whatever is wrong with the text is a ValueError."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("not JSON: nested too deeply") from error


def _not_json(error: json.JSONDecodeError) -> str:
    return f"not JSON: {error.msg} (column {error.colno})"


def _object(value: object) -> Row:
    if not isinstance(value, dict):
        raise ValueError(f"expected an object, found {type(value).__name__}")
    return value


def _only_list(value: object) -> list[Any]:
    """A list of rows, or the one list in an object such as `{"version": 1, "data": [...]}`."""
    if isinstance(value, list):
        return value
    lists = [item for item in _object(value).values() if isinstance(item, list)]
    if len(lists) != 1:
        raise ValueError(
            f"expected a list of objects, or an object with one list; found {len(lists)} lists"
        )
    return lists[0]
