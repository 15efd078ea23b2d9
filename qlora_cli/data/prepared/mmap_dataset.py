"""A prepared set on disk: a folder of flat arrays that are read where they lie.

input_ids.bin      int32, the tokens of all examples one after the other
learnt.bin         one byte a token: whether it is learnt
ends.bin           int64 for each example: tokens up to its end
sources.bin        int32 for each example: which of the sources it is from
places.txt         utf-8, the place of each example's row, one a line
place_ends.bin     int64 for each example: bytes of places.txt up to its end
facts.json         what is known about the whole

So a set that is larger than memory is trained on like a small one.
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

from qlora_cli.common.hashing import new_sha256
from qlora_cli.common.untrusted_files import read_object
from qlora_cli.types import IGNORE_INDEX, Example

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_COLUMNS = {
    "input_ids.bin": "int32",
    "learnt.bin": "uint8",
    "ends.bin": "int64",
    "sources.bin": "int32",
    "places.txt": "uint8",
    "place_ends.bin": "int64",
}
_FACTS = "facts.json"


class DatasetWriter:
    """Writes examples to a folder, one after the other. `close` makes it a prepared set."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._num_tokens = 0
        self._num_place_bytes = 0
        self._digest = new_sha256()
        with ExitStack() as stack:
            self._files: dict[str, BinaryIO] = {
                name: stack.enter_context((folder / name).open("wb")) for name in _COLUMNS
            }
            self._stack = stack.pop_all()

    def add(self, example: Example, source: int, place: str) -> None:
        """Append an example.

        Args:
            source: index of the source that it is from.
            place: where its row stands, as messages to the user say it.
        """
        line = f"{place}\n".encode("utf-8", "surrogateescape")
        self._num_tokens += len(example.input_ids)
        self._num_place_bytes += len(line)
        learnt = bytes(map(IGNORE_INDEX.__ne__, example.labels))
        input_ids = array("i", example.input_ids)
        self._digest.update(array("q", [source, len(input_ids)]).tobytes() + input_ids.tobytes())
        self._digest.update(learnt)
        self._write("input_ids.bin", input_ids)
        self._write("learnt.bin", learnt)
        self._write("ends.bin", array("q", [self._num_tokens]))
        self._write("sources.bin", array("i", [source]))
        self._write("places.txt", line)
        self._write("place_ends.bin", array("q", [self._num_place_bytes]))

    @property
    def digest(self) -> str:
        """sha256 of the examples so far: tokens, what of them is learnt, and sources, in order."""
        return self._digest.hexdigest()

    def close(self, facts: dict[str, Any]) -> None:
        """Finish the set, with what is known about the whole of it."""
        self._stack.close()
        sizes = {name: (self._folder / name).stat().st_size for name in _COLUMNS}
        text = json.dumps({"facts": facts, "bytes": sizes}, indent=2)
        (self._folder / _FACTS).write_text(text + "\n", encoding="utf-8")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()

    def _write(self, name: str, data: bytes | array[int]) -> None:
        self._files[name].write(data)


class MmapDataset(Sequence[Example]):
    """The examples of a folder, read when they are asked for."""

    def __init__(self, folder: Path) -> None:
        import numpy as np

        self.folder = folder
        columns = {
            name: np.memmap(folder / name, dtype=dtype, mode="r")
            for name, dtype in _COLUMNS.items()
        }
        self._input_ids, self._learnt = columns["input_ids.bin"], columns["learnt.bin"]
        self._ends, self._sources = columns["ends.bin"], columns["sources.bin"]
        self._places, self._place_ends = columns["places.txt"], columns["place_ends.bin"]

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each example, without reading any of them."""
        import numpy as np

        lengths: NDArray[np.int64] = np.diff(self._ends, prepend=0)
        return lengths

    @cached_property
    def num_supervised(self) -> NDArray[np.int64]:
        """Tokens of each example that are learnt. The first has no predecessor."""
        import numpy as np

        starts = self._ends - self.lengths
        whole: NDArray[np.int64] = np.add.reduceat(self._learnt, starts, dtype=np.int64)
        counts: NDArray[np.int64] = whole - self._learnt[starts]
        return counts

    def num_by_source(self, num_sources: int) -> list[int]:
        """Examples of each of the sources, which follow one another."""
        import numpy as np

        counts: list[int] = np.bincount(self._sources, minlength=num_sources).tolist()
        return counts

    def source(self, index: int) -> int:
        """Which of the sources an example is from."""
        return int(self._sources[index])

    def place(self, index: int) -> str:
        """Where the row of an example stands: `train.jsonl:17`."""
        start, end = self._span(self._place_ends, index)
        return self._places[start : end - 1].tobytes().decode("utf-8", "surrogateescape")

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
        learnt = self._learnt[start:end].tolist()
        pairs = zip(ids, learnt, strict=True)
        return Example(ids, [token if is_learnt else IGNORE_INDEX for token, is_learnt in pairs])

    @staticmethod
    def _span(ends: NDArray[np.int64], index: int) -> tuple[int, int]:
        return int(ends[index - 1]) if index else 0, int(ends[index])


def read_facts(folder: Path) -> dict[str, Any] | None:
    """What was given to `SetWriter.close`; None if there is no whole prepared set."""
    try:
        known = read_object(folder / _FACTS)
        sizes = {name: (folder / name).stat().st_size for name in _COLUMNS}
    except (OSError, ValueError):
        return None
    facts = known.get("facts")
    return facts if isinstance(facts, dict) and known.get("bytes") == sizes else None
