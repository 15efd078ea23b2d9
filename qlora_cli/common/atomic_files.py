"""Atomic, durable writes of files and folders.

Everything is written under another name first, flushed to the disk, and then renamed. So a reader
finds a whole file or none, also after a kill or a loss of power.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qlora_cli.common.hashing import hash_file, new_sha256


@contextmanager
def atomic_folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield an empty folder to fill. It gets the name `path` when the block ends.

    If the block raises, the folder is removed. What an earlier process left behind when it was
    killed is removed first. Files become readable for whoever may read the folder.

    Args:
        replace: an existing folder `path` is exchanged for the new one.

    Raises:
        OSError: the disk is full, or broken.
    """
    unfinished = unfinished_of(path)
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        _share_read_access(unfinished)
        for one in unfinished.rglob("*"):
            _flush(one)
        if replace and path.exists():
            leaving = _leaving(path)
            os.replace(path, leaving)
            put_in_place(unfinished, path)
            shutil.rmtree(leaving, ignore_errors=True)
        else:
            put_in_place(unfinished, path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a path to write a file to. The file gets the name `path` when the block ends.

    If the block raises, the file is removed, and an earlier `path` is as it was. A pipe or a device
    is written to directly.

    Raises:
        OSError: the disk is full, or broken.
    """
    if path.exists() and not path.is_file():
        yield path
        return
    unfinished = unfinished_of(path)
    try:
        yield unfinished
        put_in_place(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def replace_file(path: Path, text: str) -> None:
    """Write a text file (UTF-8), or replace it, atomically.

    Raises:
        OSError: the disk is full, or broken.
    """
    with atomic_file(path) as unfinished:
        write_file(unfinished, [text.encode()])


def write_file(path: Path, pieces: Iterable[bytes | memoryview]) -> dict[str, Any]:
    """Write a file under its final name and flush it to the disk (durable, not atomic).

    Returns:
        {"bytes", "sha256"} of what was written.

    Raises:
        OSError: the disk is full, or broken.
    """
    digest, size = new_sha256(), 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        for piece in pieces:
            digest.update(piece)
            size += len(piece)
            left = memoryview(piece)
            while left:  # a disk that is nearly full takes less than it is given
                left = left[os.write(descriptor, left) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return {"bytes": size, "sha256": digest.hexdigest()}


def write_json(path: Path, value: object) -> dict[str, Any]:
    """Write a JSON file as `write_file` does."""
    return write_file(path, [json.dumps(value).encode()])


def describe_file(path: Path) -> dict[str, Any]:
    """Return {"bytes", "sha256"} of an existing file, to compare with `write_file`'s."""
    return {"bytes": path.stat().st_size, "sha256": hash_file(path)}


def put_in_place(unfinished: Path, path: Path) -> None:
    """Flush a finished file or folder and give it its name."""
    _flush(unfinished)
    os.replace(unfinished, path)
    _flush(path.parent)


def remove_folder(path: Path) -> None:
    """Remove a folder. If this is cut short, nothing incomplete is left under `path`."""
    leaving = _leaving(path)
    os.replace(path, leaving)
    shutil.rmtree(leaving)


def unfinished_of(path: Path) -> Path:
    """Return the name that `path` has while it is written."""
    return path.with_name(f".{path.name}.unfinished")


def _leaving(path: Path) -> Path:
    """Return a free name for a folder that is about to be removed."""
    leaving = path.with_name(f".{path.name}.removed")
    shutil.rmtree(leaving, ignore_errors=True)
    return leaving


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _share_read_access(folder: Path) -> None:
    """Give files the permissions of their folder.

    safetensors makes files that only their owner can read, so that a server that runs as another
    user could not load them.
    """
    for file in folder.iterdir():
        if file.is_file():
            file.chmod(folder.stat().st_mode & 0o666)
