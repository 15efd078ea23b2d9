"""SHA-256 digests of the files in a folder of weights: a damaged file is refused, not loaded."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from qlora_cli.common.hashing import hash_once
from qlora_cli.common.untrusted_files import read_object, refuse_foreign
from qlora_cli.errors import ModelError

log = logging.getLogger("qlora")

DIGESTS = "digests.json"
"""Name of each file -> its SHA-256. Other programs ignore this file."""
_CARD = "README.md"
"""The model card, which changes after training and may be edited."""
_TOKENIZER = "tokenizer.json"
_AT_ONCE = 4
"""Files that are read at once: hashing takes longer than reading from a fast disk."""


def write_digests(folder: Path) -> None:
    """Write the digests of all files in a folder, except the model card.

    Raises:
        OSError: a file cannot be read, or the disk is full.
    """
    names = sorted(
        file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()
    )
    digests = _hash_files(folder, [name for name in names if name not in (_CARD, DIGESTS)])
    (folder / DIGESTS).write_text(json.dumps(digests, indent=2) + "\n", encoding="utf-8")


def refuse_damaged(folder: Path, *, hint: str | None = None) -> None:
    """Refuse a folder whose weights or tokenizer are not, byte for byte, those that were written.

    Users edit settings and templates (such as the base's name in an adapter), so a warning names
    those that differ. A folder without digests is not checked: it is from an earlier version or
    another program. Nor are files that the digests do not name.

    Args:
        hint: how to get an undamaged folder.

    Raises:
        ModelError: weights or tokenizer differ or are missing, the digests cannot be read, or a
            link leads out of the folder.
    """
    path = folder / DIGESTS
    if not path.exists():
        return
    refuse_foreign(folder)
    ways_out = (
        f"{hint or 'restore the file from a copy, or write the folder again'}; "
        f"if you changed it yourself, delete {path}: without it nothing is verified"
    )
    try:
        written, found = _read_twice(folder)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}", hint=ways_out) from error
    for name, digest in written.items():
        if found.get(name) == digest:
            continue
        file = folder / name
        is_edited = file.suffix != ".safetensors" and name != _TOKENIZER
        if is_edited:
            log.warning(
                "%s %s since it was written (by its SHA-256 in %s); if you did not do that, %s",
                file,
                "has changed" if name in found else "was removed",
                path.name,
                hint or "restore it from a copy",
            )
        elif name not in found:
            raise ModelError(f"{file} is missing: {path.name} lists it", hint=ways_out)
        else:
            raise ModelError(
                f"{file} is damaged: its SHA-256 is {found[name][:12]}..., and was "
                f"{str(digest)[:12]}... when it was written (in {path.name})",
                hint=ways_out,
            )


def _read_twice(folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the digests that were written, and those of the files that are there.

    If they differ, both are read again: a run may have replaced its weights meanwhile. Files that
    did not change since are not hashed again.

    Raises:
        OSError: a file cannot be read, the second time too.
        ValueError: the digests cannot be used, the second time too.
    """
    with suppress(OSError, ValueError):
        written, found = _read(folder)
        if written == found:
            return written, found
    return _read(folder)


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    written = read_object(folder / DIGESTS)
    _refuse_outside(written)
    return written, _hash_files(folder, [name for name in written if (folder / name).is_file()])


def _hash_files(folder: Path, names: list[str]) -> dict[str, str]:
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        digests = pool.map(hash_once, [folder / name for name in names])
        return dict(zip(names, digests, strict=True))


def _refuse_outside(names: Iterable[str]) -> None:
    """Raise ValueError if a name leads out of its folder. `refuse_foreign` checks the links."""
    for name in names:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\0" in name:
            raise ValueError(f"it names {name!r}, and only files of its own folder are read")
