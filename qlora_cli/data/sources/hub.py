"""Read rows of Hub datasets, lazily from disk or network."""

from __future__ import annotations

import re
from collections.abc import Iterator

from qlora_cli.errors import DataError
from qlora_cli.types import Row

_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def is_hub_id(path: str) -> bool:
    return _ID.fullmatch(path) is not None


def hub_rows(
    path: str, *, name: str | None, split: str, revision: str | None, streaming: bool
) -> Iterator[Row]:
    """Yield the rows in order.

    Args:
        name: configuration of the dataset.
        streaming: download rows as they are read, instead of the whole split first.

    Raises:
        DataError: the dataset cannot be loaded, or not to its end.
    """
    import datasets

    try:
        yield from datasets.load_dataset(
            path, name, split=split, revision=revision, streaming=streaming
        )
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{path}: no such file or folder, and the Hub dataset of that name (configuration "
            f"{name}, split {split}, revision {revision}) cannot be loaded: {error}",
            hint="check the path, the split and the network; a local copy needs no network",
        ) from error
