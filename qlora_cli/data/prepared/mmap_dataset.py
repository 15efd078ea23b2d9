"""A prepared dataset on disk: a folder of flat arrays, memory-mapped for reading.

input_ids.bin      int32 per token: the tokens of all examples one after the other
supervised.bin     uint8 per token: 1 if it is supervised
ends.bin           int64 per example: number of tokens up to its end
sources.bin        int32 per example: index of its source
linked.bin         uint8 per example: 1 if it stays with the example before it
prefixes.bin       int32 per example: tokens that it shares with the first example of its link
values.bin         float32, the same number per example: what an objective learns from besides
places.txt         utf-8: the place of each example's row, one per line
place_ends.bin     int64 per example: number of bytes of places.txt up to its end
facts.json         what is known about the whole dataset, and size and digest of each file

So a dataset larger than memory can be trained on like a small one. The digests are computed while
the files are written, and `damaged_file` compares the files with them.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, Self, overload

from qlora_cli.common.atomic_files import describe_file
from qlora_cli.common.hashing import hash_json, new_sha256
from qlora_cli.common.untrusted_files import read_object
from qlora_cli.types import IGNORE_INDEX, Example

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_COLUMNS = {
    "input_ids.bin": "int32",
    "supervised.bin": "uint8",
    "ends.bin": "int64",
    "sources.bin": "int32",
    "linked.bin": "uint8",
    "prefixes.bin": "int32",
    "values.bin": "float32",
    "places.txt": "uint8",
    "place_ends.bin": "int64",
}
_FACTS = "facts.json"


class DatasetWriter:
    """Write examples to a folder, one after the other. `close` completes the dataset."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._num_tokens = 0
        self._num_place_bytes = 0
        self._digest = new_sha256()
        self._digests = {name: new_sha256() for name in _COLUMNS}
        with ExitStack() as stack:
            self._files: dict[str, BinaryIO] = {
                name: stack.enter_context((folder / name).open("wb")) for name in _COLUMNS
            }
            self._stack = stack.pop_all()

    def add(self, example: Example, source: int, place: str) -> None:
        """Append an example.

        Args:
            source: index of its source.
            place: where its row was read, as messages to the user show it.
        """
        line = f"{place}\n".encode("utf-8", "surrogateescape")
        self._num_tokens += len(example.input_ids)
        self._num_place_bytes += len(line)
        supervised = bytes(map(IGNORE_INDEX.__ne__, example.labels))
        input_ids = array("i", example.input_ids)
        # The complement of a source is negative, so a linked example never hashes like another one.
        head = array("q", [~source if example.is_linked else source, len(input_ids)])
        values = array("f", example.values)
        self._digest.update(head.tobytes() + input_ids.tobytes() + supervised + values.tobytes())
        self._write("input_ids.bin", input_ids)
        self._write("supervised.bin", supervised)
        self._write("ends.bin", array("q", [self._num_tokens]))
        self._write("sources.bin", array("i", [source]))
        self._write("linked.bin", bytes([example.is_linked]))
        self._write("prefixes.bin", array("i", [example.prefix]))
        self._write("values.bin", values)
        self._write("places.txt", line)
        self._write("place_ends.bin", array("q", [self._num_place_bytes]))

    @property
    def digest(self) -> str:
        """sha256 of the examples so far, in order: tokens, loss mask, values, sources and links."""
        return self._digest.hexdigest()

    def close(self, facts: dict[str, Any]) -> None:
        """Complete the dataset, with facts about the whole of it."""
        self._stack.close()
        files = {
            name: {"bytes": (self._folder / name).stat().st_size, "sha256": digest.hexdigest()}
            for name, digest in self._digests.items()
        }
        known = {"facts": facts, "files": files}
        text = json.dumps({**known, "sha256": hash_json(known)}, indent=2)
        (self._folder / _FACTS).write_text(text, encoding="utf-8")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()

    def _write(self, name: str, data: bytes | array[int] | array[float]) -> None:
        self._files[name].write(data)
        self._digests[name].update(data)


class MmapDataset(Sequence[Example]):
    """The examples in a folder, read on access."""

    def __init__(self, folder: Path) -> None:

        self.folder = folder
        columns = {name: _read_column(folder / name, dtype) for name, dtype in _COLUMNS.items()}
        self._input_ids, self._supervised = columns["input_ids.bin"], columns["supervised.bin"]
        self._ends, self._sources = columns["ends.bin"], columns["sources.bin"]
        self._places, self._place_ends = columns["places.txt"], columns["place_ends.bin"]
        self.is_linked: NDArray[np.uint8] = columns["linked.bin"]
        """1 for each example that stays with the example before it."""
        self.prefixes: NDArray[np.int32] = columns["prefixes.bin"]
        """For each example, the tokens at its beginning that the first of its link has too."""
        self._values = columns["values.bin"].reshape(len(self._ends), -1)

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Number of tokens in each example, without reading any of them."""
        import numpy as np

        lengths: NDArray[np.int64] = np.diff(self._ends, prepend=0)
        return lengths

    @cached_property
    def num_supervised(self) -> NDArray[np.int64]:
        """Supervised tokens in each example, except the first, which has no predecessor."""
        import numpy as np

        starts = self._ends - self.lengths
        whole: NDArray[np.int64] = np.add.reduceat(self._supervised, starts, dtype=np.int64)
        counts: NDArray[np.int64] = whole - self._supervised[starts]
        return counts

    def num_by_source(self, num_sources: int) -> list[int]:
        """Count the examples of each source. Sources follow one another."""
        import numpy as np

        counts: list[int] = np.bincount(self._sources, minlength=num_sources).tolist()
        return counts

    def source(self, index: int) -> int:
        """Return the index of an example's source."""
        return int(self._sources[index])

    def place(self, index: int) -> str:
        """Return where the row of an example was read: `train.jsonl:17`."""
        start, end = self._span(self._place_ends, index)
        line: bytes = self._places[start : end - 1].tobytes()
        return line.decode("utf-8", "surrogateescape")

    def first_with_token_from(self, token_id: int) -> tuple[int, int] | None:
        """Find the first example with a token of this id or a larger one.

        Returns:
            The index of the example, and the id; None if there is none.
        """
        import numpy as np

        if not len(self._input_ids) or int(self._input_ids.max()) < token_id:
            return None
        position = int(np.argmax(self._input_ids >= token_id))
        example = int(np.searchsorted(self._ends, position, side="right"))
        return example, int(self._input_ids[position])

    def last_tokens(self) -> set[int]:
        """Return the tokens that examples end with."""
        import numpy as np

        found: set[int] = set(np.unique(self._input_ids[self._ends - 1]).tolist())
        return found

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        start, end = self._span(self._ends, range(len(self))[index])
        ids = self._input_ids[start:end].tolist()
        supervised = self._supervised[start:end].tolist()
        pairs = zip(ids, supervised, strict=True)
        labels = [token if is_supervised else IGNORE_INDEX for token, is_supervised in pairs]
        return Example(
            ids,
            labels,
            bool(self.is_linked[index]),
            int(self.prefixes[index]),
            tuple(self._values[index].tolist()),
        )

    @staticmethod
    def _span(ends: NDArray[np.int64], index: int) -> tuple[int, int]:
        return int(ends[index - 1]) if index else 0, int(ends[index])


def _read_column(path: Path, dtype: str) -> Any:
    """Map a file into memory. An empty file cannot be mapped."""
    import numpy as np

    if not path.stat().st_size:
        return np.empty(0, dtype)
    return np.memmap(path, dtype=dtype, mode="r")


def read_facts(folder: Path) -> dict[str, Any] | None:
    """Return the facts given to `DatasetWriter.close`; None if the dataset is not complete."""
    known = _read_known(folder)
    if known is None:
        return None
    sizes = {name: described["bytes"] for name, described in known["files"].items()}
    try:
        found = {name: (folder / name).stat().st_size for name in sizes}
    except OSError:
        return None
    facts: dict[str, Any] = known["facts"]
    return facts if found == sizes else None


def damaged_file(folder: Path) -> str | None:
    """Read a dataset, and return the name of a file that is not as it was written, if any."""
    known = _read_known(folder)
    if known is None:
        return _FACTS
    for name in _COLUMNS:
        try:
            if describe_file(folder / name) != known["files"][name]:
                return name
        except OSError:
            return name
    return None


def _read_known(folder: Path) -> dict[str, Any] | None:
    try:
        known = read_object(folder / _FACTS)
    except (OSError, ValueError):
        return None
    digest = known.pop("sha256", None)
    return known if digest == hash_json(known) else None
