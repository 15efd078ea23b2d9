"""Read and write safetensors files with one tensor in memory at a time."""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_cli.common.safetensors_writer import DTYPES, header_of, item_bytes
from qlora_cli.common.untrusted_files import object_of, read_object, refuse_foreign
from qlora_cli.errors import ModelError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

INDEX = "model.safetensors.index.json"
_CHUNK = 2**24
"""Bytes that are copied at a time."""
_MAX_HEADER = 100_000_000
"""Bytes, the limit of the safetensors library."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """The place, dtype and shape of a tensor in a file."""

    file: Path
    dtype: str
    """Name in the safetensors format, such as BF16."""
    shape: tuple[int, ...]
    start: int
    size: int
    """Bytes."""

    @property
    def torch_dtype(self) -> torch.dtype:
        import torch

        if self.dtype not in DTYPES:
            raise ModelError(f"{self.file}: weights of dtype {self.dtype} are not supported")
        dtype: torch.dtype = getattr(torch, DTYPES[self.dtype])
        return dtype

    def resized(self, shape: tuple[int, ...]) -> StoredTensor:
        """Return it with another shape, and without a place."""
        per_value = self.size // max(1, math.prod(self.shape))
        return StoredTensor(self.file, self.dtype, shape, 0, per_value * math.prod(shape))


class Shards:
    """The tensors of a model folder, or of one file, in the order of storage."""

    def __init__(self, path: Path) -> None:
        """Read the headers.

        Raises:
            ModelError: a file is missing, or is not a safetensors file.
        """
        self.files = [path] if path.is_file() else _files(path)
        self.metadata: dict[Path, dict[str, str]] = {}
        self.tensors: dict[str, StoredTensor] = {}
        for file in self.files:
            for name, stored in self._header(file):
                if name in self.tensors:
                    raise ModelError(f"{file}: {name} is also in {self.tensors[name].file.name}")
                self.tensors[name] = stored

    @property
    def has_index(self) -> bool:
        """Tell whether the folder has an index of its tensors."""
        return (self.files[0].parent / INDEX).is_file()

    def read(self, name: str) -> Tensor:
        """Read one tensor into new memory."""
        import torch

        stored = self.tensors[name]
        buffer = torch.empty(stored.size, dtype=torch.uint8)
        memory: Any = buffer.numpy()
        with stored.file.open("rb") as file:
            file.seek(stored.start)
            if file.readinto(memory) != stored.size:
                raise ModelError(f"{stored.file} ends in the middle of {name}")
        return buffer.view(stored.torch_dtype).reshape(stored.shape)

    def chunks(self, name: str) -> Iterator[bytes]:
        """Yield the bytes of one tensor, piece by piece."""
        stored = self.tensors[name]
        with stored.file.open("rb") as file:
            file.seek(stored.start)
            left = stored.size
            while left:
                piece = file.read(min(_CHUNK, left))
                if not piece:
                    raise ModelError(f"{stored.file} ends in the middle of {name}")
                left -= len(piece)
                yield piece

    def read_start(self, name: str, size: int) -> bytes:
        """Read the first `size` bytes of one tensor, or all if it is smaller."""
        stored = self.tensors[name]
        with stored.file.open("rb") as file:
            file.seek(stored.start)
            return file.read(min(size, stored.size))

    def digest(self, name: str) -> str:
        """Hash the bytes of one tensor."""
        found = hashlib.blake2b(digest_size=16)
        for piece in self.chunks(name):
            found.update(piece)
        return found.hexdigest()

    def _header(self, path: Path) -> Iterator[tuple[str, StoredTensor]]:
        try:
            # Opening a pipe would block forever.
            if path.exists() and not path.is_file():
                raise ValueError("it is not a regular file")
            with path.open("rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                size = path.stat().st_size - 8 - length
                if size < 0 or length > _MAX_HEADER:
                    raise ValueError("its header is longer than the file, or than any valid header")
                header = object_of(file.read(length))
            self.metadata[path] = _metadata(header.pop("__metadata__", {}))
            found = [(name, _stored(path, name, entry, size)) for name, entry in header.items()]
        except (OSError, ValueError, struct.error) as error:
            raise ModelError(f"{path} is not a safetensors file: {error}") from error
        for name, stored in sorted(found, key=lambda pair: pair[1].start):
            yield name, replace(stored, start=8 + length + stored.start)


def _metadata(found: object) -> dict[str, str]:
    if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
        raise ValueError("its __metadata__ is not a mapping of strings")
    return found


def _stored(path: Path, name: str, entry: Any, size: int) -> StoredTensor:
    """Check one entry of a header. `start` counts from the end of the header.

    Args:
        size: bytes after the header.

    Raises:
        ValueError: it does not fit this file.
    """
    try:
        dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{name} has no dtype, shape and data_offsets") from error
    numbers = (*shape, start, end)
    if not isinstance(dtype, str) or not all(type(n) is int and n >= 0 for n in numbers):
        raise ValueError(f"{name} has no dtype, shape and data_offsets")
    is_known = dtype in DTYPES
    if not start <= end <= size or (
        is_known and end - start != math.prod(shape) * item_bytes(dtype)
    ):
        raise ValueError(f"the place of {name} ({dtype} {list(shape)}) in its header is wrong")
    return StoredTensor(path, dtype, shape, start, end - start)


def _files(folder: Path) -> list[Path]:
    refuse_foreign(folder)
    index = folder / INDEX
    if index.is_file():
        try:
            return [
                folder / name for name in sorted(set(read_object(index)["weight_map"].values()))
            ]
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise ModelError(f"{index} cannot be read: {error}") from error
    alone = folder / "model.safetensors"
    found = [alone] if alone.is_file() else sorted(folder.glob("*.safetensors"))
    if not found:
        raise ModelError(f"{folder} has no safetensors weights")
    return found


def write_shard(
    path: Path,
    layout: Mapping[str, StoredTensor],
    metadata: Mapping[str, str],
    pieces: Callable[[str], Iterable[bytes | memoryview]],
) -> dict[str, str]:
    """Write a safetensors file: the header first, then one tensor after the other.

    Args:
        layout: dtype and shape of each tensor, in order. Their places are ignored.
        pieces: called with the name of each tensor, yields its bytes.

    Returns:
        The digest of each tensor.
    """
    header = header_of(
        {name: (stored.dtype, stored.shape, stored.size) for name, stored in layout.items()},
        metadata,
    )
    digests = {}
    with path.open("wb") as file:
        file.write(header)
        for name, stored in layout.items():
            before, found = file.tell(), hashlib.blake2b(digest_size=16)
            for piece in pieces(name):
                file.write(piece)
                found.update(piece)
            assert file.tell() - before == stored.size, name
            digests[name] = found.hexdigest()
    return digests
