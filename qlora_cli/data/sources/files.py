"""Read rows of local files. For another kind of file, add a function and its ending to `_READERS`.

Everything but a JSON list is read piece by piece, so a file may be larger than memory.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import glob
import gzip
import io
import json
import logging
import lzma
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from qlora_cli.common.formatting import first_names
from qlora_cli.data.sources.quotation_marks import swallowed_lines
from qlora_cli.data.sources.rows import BadRows, LocatedRow
from qlora_cli.data.sources.saved_dataset import saved_files
from qlora_cli.data.sources.strict_json import (
    as_object,
    list_items,
    not_json,
    only_list,
    parse,
    skip_space,
)
from qlora_cli.errors import DataError

if TYPE_CHECKING:
    from pyarrow import RecordBatch

log = logging.getLogger("qlora")

_BATCH = 1024
# UTF-32 first: its little-endian mark begins with that of UTF-16.
_OTHER_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
_NAMED = 5
"""Files of a folder named in the error if none can be read."""


def is_pattern(path: str) -> bool:
    """Return True if a path is a pattern for all files that match it."""
    return glob.has_magic(path) and not Path(path).exists()


def is_table(path: Path) -> bool:
    """Return True if a file is a table with a header."""
    return _kind(path) in _DIALECTS


def names_a_file(path: str) -> bool:
    """Return True if a path ends like a data file."""
    return any(suffix.lower() in _ENDINGS for suffix in Path(path).suffixes)


def find_files(path: str) -> list[Path]:
    """Return the data files at a path, in a folder or of a pattern, sorted by name.

    Raises:
        DataError: there is none.
    """
    root = Path(path)
    if is_pattern(path):
        # A file may match in several ways (`**/**`), but is read once.
        matching = sorted(set(map(Path, glob.glob(path, recursive=True))))
        if not matching:
            raise DataError(f"{path}: nothing matches; {_contents(_fixed_part(path))}")
        found = [file for file in matching if file.is_file()]
    elif root.is_dir() and (saved := saved_files(root)) is not None:
        found = saved
    else:
        found = sorted(root.iterdir()) if root.is_dir() else [root]
    files = _data_files([file for file in found if file.is_file()], path)
    if not files:
        raise DataError(
            f"{path}: no data file; found {_names(found)}, expected {', '.join(_ENDINGS)}; all "
            f"but {' and '.join(_BINARY)} may be compressed ({', '.join(_COMPRESSIONS)})"
        )
    return files


def _fixed_part(pattern: str) -> Path:
    """Return the folder in which a pattern begins."""
    parts = Path(pattern).parts
    return Path(*parts[: next(i for i, part in enumerate(parts) if glob.has_magic(part))])


def _contents(folder: Path) -> str:
    if not folder.is_dir():
        return f"there is no folder {folder}"
    return f"the folder {folder.absolute()} contains {_names(sorted(folder.iterdir()))}"


def _names(files: list[Path]) -> str:
    names = [f"{file.name}/" if file.is_dir() else file.name for file in files]
    return first_names(names, _NAMED) or "nothing"


def read_file(
    path: Path, bad: BadRows, columns: list[str] | None, delimiter: str | None
) -> Iterator[LocatedRow]:
    """Yield the rows in order. What cannot be read as a row is added to `bad`.

    Args:
        columns: the column names of a table without a header.
        delimiter: the delimiter of a table; None takes the default of its kind.

    Raises:
        DataError: the file cannot be read any further.
    """
    kind = _kind(path)
    assert kind is not None
    if columns is not None and kind not in _DIALECTS:
        raise DataError(f"{path}: columns are for {', '.join(_DIALECTS)} files without a header")
    if delimiter is not None and kind not in _DIALECTS:
        raise DataError(f"{path}: a delimiter is for {', '.join(_DIALECTS)} files")
    with _reading(path):
        if kind in _DIALECTS:
            yield from _read_table(path, bad, kind, columns, delimiter)
        else:
            yield from _READERS[kind](path, bad)


def _data_files(found: list[Path], path: str) -> list[Path]:
    files = [file for file in found if _kind(file)]
    if left_out := [file.name for file in found if file not in files]:
        log.info("%s: left out %s", path, ", ".join(left_out))
    return files


def _kind(path: Path) -> str | None:
    """Return the ending that decides how a file is read, without that of a compression."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    is_compressed = suffixes[-1:] and suffixes[-1] in _COMPRESSIONS
    kind = "".join(suffixes[-2:-1] if is_compressed else suffixes[-1:])
    return kind if kind in _ENDINGS and not (is_compressed and kind in _BINARY) else None


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except EOFError as error:
        raise DataError(f"{path}: the compressed file is cut short") from error
    except (OSError, zlib.error, lzma.LZMAError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise DataError(f"{path}: cannot be read: {reason}") from error


def _open(path: Path) -> IO[bytes]:
    """Open a file for bytes, decompressed as they are read."""
    unpack = _COMPRESSIONS.get(path.suffix.lower())
    file: IO[bytes] = unpack(path) if unpack else path.open("rb")
    return file


def _open_zst(path: Path) -> IO[bytes]:
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))


_COMPRESSIONS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zst,
}


def _read_jsonl(path: Path, bad: BadRows) -> Iterator[LocatedRow]:
    opening, line, num_rows = "", "", 0
    for place, line in _lines(path, bad):
        opening = opening or line
        try:
            row = as_object(parse(line))
        except json.JSONDecodeError as error:
            is_zero = line[error.pos : error.pos + 1] == "\0"
            zeros = "; there is a NUL: was the file cut short, or is it UTF-16?" if is_zero else ""
            bad.add(place, f"{not_json(error)}{zeros}")
        except ValueError as error:
            bad.add(place, error)
        else:
            num_rows += 1
            yield LocatedRow(row, place)
    # A nested object on a line of its own would be a valid row.
    if opening.strip() == "{" and line.strip() == "}":
        raise DataError(
            f"{path}: objects over several lines, where each line should be an object of its own",
            hint="jq -c . FILE > NEW_FILE writes one object per line",
        )
    first = opening.lstrip()[:1]
    # In a list with one object per line, the last line has no comma, so it is a valid row.
    if first == "[" and line.rstrip()[-1:] == "]" and num_rows <= 1:
        raise DataError(
            f"{path}: one JSON list, where each line should be an object of its own",
            hint="rename it to .json, the ending for a file that is one list",
        )


def _read_text(path: Path, bad: BadRows) -> Iterator[LocatedRow]:
    for place, line in _lines(path, bad):
        yield LocatedRow({"text": line}, place)


def _read_json(path: Path, bad: BadRows) -> Iterator[LocatedRow]:
    text = _decoded(path)
    try:
        for place, value in _located_values(path, text):
            try:
                yield LocatedRow(as_object(value), place)
            except ValueError as error:
                bad.add(place, error)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}:{error.lineno}: {not_json(error)}",
            hint="if it has one object per line, rename it to .jsonl",
        ) from error
    except ValueError as error:
        raise DataError(f"{path}: {error}") from error


def _located_values(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """Yield the items of a list, or of the one list in an object: `{"v": 1, "data": [...]}`."""
    start = skip_space(text, 0)
    if text[start : start + 1] != "[":
        for number, value in enumerate(only_list(as_object(parse(text))), start=1):
            yield f"{path}, row {number}", value
        return
    line, counted = 1, 0
    for at, value in list_items(text, start):
        line += text.count("\n", counted, at)
        counted = at
        yield f"{path}:{line}", value


def _read_table(
    path: Path, bad: BadRows, kind: str, columns: list[str] | None, delimiter: str | None
) -> Iterator[LocatedRow]:
    dialect = {**_DIALECTS[kind], **({} if delimiter is None else {"delimiter": delimiter})}
    # The default limit of 128 KiB per field is too small for documents.
    csv.field_size_limit(2**31 - 1)
    header = columns
    with _open(path) as file:
        # A badly encoded field must not spoil the rest of the file, and a record may span several
        # lines: bytes that are not UTF-8 pass through and are found in the record.
        taken: list[str] = []
        lines = _kept_in(taken, _without_bom(file, path))
        reader = csv.reader(lines, strict=True, **dialect)
        while True:
            taken.clear()
            first = reader.line_num + 1
            place = f"{path}:{first}"
            try:
                values = next(reader)
                for value in values:
                    value.encode("utf-8", "surrogateescape").decode("utf-8")
            except StopIteration:
                return
            except csv.Error as error:
                swallowed = swallowed_lines(taken, dialect["delimiter"], first)
                bad.add(place, f"not {kind[1:].upper()}: {error}{swallowed}")
                continue
            except UnicodeDecodeError as error:
                if header is None:
                    raise DataError(f"{place}: {_not_utf8(error)}") from error
                bad.add(place, _not_utf8(error))
                continue
            if header is None:
                header = _header(values, place)
                if delimiter is None:
                    _refuse_other_delimiter(values, place, dialect["delimiter"])
            elif values and len(values) != len(header):
                given = "the header has" if columns is None else "there are columns for"
                why = swallowed_lines(taken, dialect["delimiter"], first)
                if not why and len(values) > len(header):
                    why = _delimited(dialect)
                bad.add(place, f"{len(values)} fields, but {given} {len(header)}{why}")
            elif values:
                yield LocatedRow(dict(zip(header, values, strict=True)), place)


def _delimited(dialect: Mapping[str, Any]) -> str:
    """Say what delimits fields: the cause, if there are too many."""
    is_quoted = dialect["quoting"] != csv.QUOTE_NONE
    outside = " outside of quotation marks" if is_quoted else ""
    return f"; fields are delimited by {dialect['delimiter']!r}{outside}"


def _kept_in(taken: list[str], lines: Iterator[bytes]) -> Iterator[str]:
    """Yield lines as text, and append each to a list."""
    for line in lines:
        text = line.decode("utf-8", "surrogateescape")
        taken.append(text)
        yield text


_DIALECTS: dict[str, dict[str, Any]] = {
    ".csv": {"delimiter": ",", "quoting": csv.QUOTE_MINIMAL},
    # text/tab-separated-values has no quoting, and texts that begin with a quotation mark are
    # common: with quoting, one of them would swallow the lines up to the next.
    ".tsv": {"delimiter": "\t", "quoting": csv.QUOTE_NONE},
}


def _read_parquet(path: Path, bad: BadRows) -> Iterator[LocatedRow]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield from _batch_rows(path, file.iter_batches(batch_size=_BATCH))
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a readable Parquet file: {error}") from error


def _read_arrow(path: Path, bad: BadRows) -> Iterator[LocatedRow]:
    import pyarrow
    import pyarrow.ipc

    try:
        with pyarrow.OSFile(str(path)) as file:
            is_stream = file.read(6) != b"ARROW1"
            file.seek(0)
            if is_stream:
                batches = iter(pyarrow.ipc.open_stream(file))
            else:
                reader = pyarrow.ipc.open_file(file)
                batches = map(reader.get_batch, range(reader.num_record_batches))
            yield from _batch_rows(path, batches)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a readable Arrow file: {error}") from error


def _batch_rows(path: Path, batches: Iterator[RecordBatch]) -> Iterator[LocatedRow]:
    number = 0
    for batch in batches:
        # pyarrow trusts the layout that a file declares, and would read outside of it.
        batch.validate(full=True)
        for start in range(0, batch.num_rows, _BATCH):
            for row in batch.slice(start, _BATCH).to_pylist():
                number += 1
                yield LocatedRow(row, f"{path}, row {number}")


_BINARY = (".parquet", ".arrow")
"""Kinds that are compressed internally, if at all."""

_READERS: dict[str, Callable[[Path, BadRows], Iterator[LocatedRow]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
    ".txt": _read_text,
}

_ENDINGS = [*_READERS, *_DIALECTS]


def _lines(path: Path, bad: BadRows) -> Iterator[tuple[str, str]]:
    """Yield each line that is not blank, with its place."""
    with _open(path) as file:
        for number, line in enumerate(_without_bom(file, path), start=1):
            place = f"{path}:{number}"
            try:
                text = line.decode("utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                bad.add(place, _not_utf8(error))
                continue
            if text.strip():
                yield place, text


def _without_bom(file: IO[bytes], path: Path) -> Iterator[bytes]:
    """Yield the lines of a file without the byte order mark at its start."""
    # Split as bytes: str.splitlines would also split at the line separators that JSON strings
    # may hold, and one badly encoded line must not spoil the rest of the file.
    first = file.readline()
    _refuse_other_encoding(first, path)
    yield first.removeprefix(codecs.BOM_UTF8)
    yield from file


def _refuse_other_encoding(data: bytes, path: Path) -> None:
    for mark, name in _OTHER_MARKS.items():
        if data.startswith(mark):
            raise DataError(
                f"{path}: {name}, by the byte order mark at its start, and not UTF-8",
                hint=f"iconv -f {name} -t UTF-8 FILE > NEW_FILE",
            )


def _header(names: list[str], place: str) -> list[str]:
    if len(set(names)) < len(names):
        raise DataError(
            f"{place}: the header names a column twice: {', '.join(names)}",
            hint="a file without a header needs the names of its columns, in data.train.columns",
        )
    return names


def _refuse_other_delimiter(header: list[str], place: str, delimiter: str) -> None:
    """Raise DataError if the header is one column that contains another usual delimiter."""
    if len(header) != 1:
        return
    if other := next((one for one in ";|\t," if one != delimiter and one in header[0]), None):
        raise DataError(
            f"{place}: the header is one column: {header[0][:80]!r}",
            hint=f"data.train.delimiter: {json.dumps(other)} if that separates the columns, "
            f"{json.dumps(delimiter)} if it is one; data.train.columns names them if this is "
            "not a header",
        )


def _decoded(path: Path) -> str:
    with _open(path) as file:
        data = file.read()
    _refuse_other_encoding(data, path)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}: {_not_utf8(error)}") from error


def _not_utf8(error: UnicodeDecodeError) -> str:
    """Say which byte is wrong. Spreadsheets on Windows save as Windows-1252 by default."""
    found = f"byte 0x{error.object[error.start]:02x} ({error.reason})"
    return f"not UTF-8: {found}; if it is Windows-1252, save the file as UTF-8"
