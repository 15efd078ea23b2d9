"""Files that are on the disk, whole, before anybody goes by their name."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def write_file(path: Path, pieces: Iterable[bytes | memoryview]) -> dict[str, Any]:
    """Write a file and flush it to the disk.

    Returns:
        {"bytes", "sha256"} of what was written.

    Raises:
        OSError: the disk is full, or broken.
    """
    digest, size = hashlib.sha256(), 0
    place = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        for piece in pieces:
            digest.update(piece)
            size += len(piece)
            left = memoryview(piece)
            while left:  # a disk that is nearly full takes less than it is given
                left = left[os.write(place, left) :]
        os.fsync(place)
    finally:
        os.close(place)
    return {"bytes": size, "sha256": digest.hexdigest()}


def write_json(path: Path, value: object) -> dict[str, Any]:
    """Write a JSON file, as `write_file` does."""
    return write_file(path, [json.dumps(value).encode()])


def replace_file(path: Path, text: str) -> None:
    """Give a file this content, whole or not at all.

    Raises:
        OSError: the disk is full, or broken.
    """
    unfinished = unfinished_of(path)
    write_file(unfinished, [text.encode()])
    put_in_place(unfinished, path)


def unfinished_of(path: Path) -> Path:
    """Where `replace_file` writes: what it leaves if it is cut short."""
    return path.with_name(f".{path.name}.unfinished")


def describe_file(path: Path) -> dict[str, Any]:
    """What `write_file` returned, of a file as it is on the disk."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def put_in_place(unfinished: Path, path: Path) -> None:
    """Give a finished file or folder its name, in one step, also for a disk that loses power."""
    if unfinished.is_dir():
        _flush(unfinished)
    os.replace(unfinished, path)
    _flush(path.parent)


def flush_files(folder: Path) -> None:
    """Wait until what a folder holds is on the disk."""
    for file in folder.iterdir():
        _flush(file)


def exchange_folder(unfinished: Path, path: Path) -> None:
    """Put a finished folder in the place of another, if there is one."""
    flush_files(unfinished)
    leaving = path.with_name(f".{path.name}.removed")
    shutil.rmtree(leaving, ignore_errors=True)
    if path.exists():
        os.replace(path, leaving)
    put_in_place(unfinished, path)
    shutil.rmtree(leaving, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Remove a folder. Cut short, it leaves nothing under its name."""
    leaving = path.with_name(f".{path.name}.removed")
    shutil.rmtree(leaving, ignore_errors=True)
    os.replace(path, leaving)
    shutil.rmtree(leaving)


def _flush(path: Path) -> None:
    place = os.open(path, os.O_RDONLY)
    try:
        os.fsync(place)
    finally:
        os.close(place)
