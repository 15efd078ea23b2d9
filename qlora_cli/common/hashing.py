"""The one hash of this package: SHA-256, as hexadecimal text.

Runs and cached data are found again by these digests, so none of them may change.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hashlib import _Hash


def new_sha256() -> _Hash:
    """Return an empty hash, to be fed piece by piece."""
    return hashlib.sha256()


def hash_text(text: str) -> str:
    """Hash a text as UTF-8. Bytes that Python could not decode are hashed as they were."""
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def hash_json(value: object) -> str:
    """Hash a value by its JSON, whatever the order of its keys."""
    return hash_text(json.dumps(value, sort_keys=True))


def hash_file(path: Path) -> str:
    """Hash the content of a file.

    Raises:
        OSError: it cannot be read.
    """
    return hash_pieces([path])


def hash_once(path: Path) -> str:
    """Hash a file; once in this process, unless its size or time changes.

    Raises:
        OSError: it cannot be read.
    """
    stat = path.stat()
    return _hash_of(path, (stat.st_ino, stat.st_size, stat.st_mtime_ns))


@cache
def _hash_of(path: Path, stamp: tuple[int, ...]) -> str:
    return hash_file(path)


def hash_pieces(pieces: Iterable[bytes | Path]) -> str:
    """Hash pieces one after another: bytes as they are, files by their content.

    Raises:
        OSError: a file cannot be read.
    """
    digest = new_sha256()
    for piece in pieces:
        if isinstance(piece, bytes):
            digest.update(piece)
        else:
            with piece.open("rb") as file:
                hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()
