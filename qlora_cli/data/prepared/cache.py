"""Cache of prepared datasets. The key is a hash of everything that a dataset depends on."""

from __future__ import annotations

import importlib.metadata
import logging
import shutil
import tempfile
import weakref
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_cli.common.atomic_files import atomic_folder
from qlora_cli.common.cache_folder import cache_folder
from qlora_cli.common.hashing import hash_json, hash_pieces
from qlora_cli.data.config import Data
from qlora_cli.data.prepared.mmap_dataset import damaged_file, read_facts
from qlora_cli.data.prepared.prepare import PreparedData, digests_of, joined_digest, prepare
from qlora_cli.data.sources import Source
from qlora_cli.errors import DataError
from qlora_cli.objectives import SUPERVISED, ObjectiveSettings
from qlora_cli.types import ModelContext

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

log = logging.getLogger("qlora")

_LIBRARIES = ("transformers", "tokenizers", "jinja2", "pyarrow")

# Settings that do not affect how rows become examples. Any other setting is part of the key, so
# forgetting one here costs time and never gives wrong data.
_FREE_OF_DATA = {"train", "evaluation", "evaluation_share", "seed", "chat_template"} | {
    "packing",
    "workers",
    "audit",
}
_FREE_OF_SOURCE = {"weight"}


def load_or_prepare(
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerFast,
    data: Data,
    *,
    use_cache: bool = True,
    context: ModelContext | None = None,
    objective: ObjectiveSettings = SUPERVISED,
) -> tuple[PreparedData, bool]:
    """Return the prepared data of some sources, and whether it was cached.

    Args:
        context: that of the model; no longer row is advised.
        use_cache: if False, prepare the data again and delete it when the program ends.
        objective: gives the values of each row.

    Raises:
        DataError: the rows cannot be prepared, or the cache cannot be written.
    """
    if not use_cache:
        folder = Path(tempfile.mkdtemp(prefix="qlora-"))
        try:
            prepared = prepare(
                sources, tokenizer, data, folder, context=context, objective=objective
            )
        # Ctrl-C must not leave it behind either.
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        weakref.finalize(prepared.examples, shutil.rmtree, folder, ignore_errors=True)
        return prepared, False
    digests = digests_of(sources)
    folder = _folder() / key_of(sources, tokenizer, data, joined_digest(digests), objective)

    def make(unfinished: Path) -> None:
        prepare(
            sources,
            tokenizer,
            data,
            unfinished,
            digests=digests,
            context=context,
            objective=objective,
        )

    try:
        return _find_or_make(folder, make)
    except OSError as error:
        raise DataError(
            f"{folder.parent}: prepared data cannot be stored here: {error}",
            hint="use --no-cache, or name another folder in QLORA_CACHE",
        ) from error


def key_of(
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerFast,
    data: Data,
    digest: str,
    objective: ObjectiveSettings = SUPERVISED,
) -> str:
    """Hash everything that the prepared data depends on.

    Args:
        digest: the digest of the data's bytes.
    """
    parts = {
        "digest": digest,
        # The path does not affect the tokens, but it is part of the rows' places.
        "sources": [one.model_dump(mode="json", exclude=_FREE_OF_SOURCE) for one in sources],
        "settings": data.model_dump(mode="json", exclude=_FREE_OF_DATA),
        "objective": objective.data_key,
        "tokenizer": tokenizer.backend_tokenizer.to_str(),
        "special_tokens": {name: str(t) for name, t in tokenizer.special_tokens_map.items()},
        "chat_template": tokenizer.chat_template,
        "versions": {name: importlib.metadata.version(name) for name in _LIBRARIES},
        "code": _code_digest(),
    }
    return hash_json(parts)[:32]


@dataclass(frozen=True, slots=True)
class CachedDataset:
    """A prepared dataset in the cache."""

    folder: Path
    paths: list[str]
    """Paths of the sources."""
    num_rows: int
    size: int
    """Size in bytes."""
    used: float
    """Time of last use, in seconds since 1970."""

    def record(self) -> dict[str, Any]:
        """Return it as JSON."""
        return {**asdict(self), "folder": str(self.folder)}


def list_datasets(*, clear: bool = False) -> list[CachedDataset]:
    """List the cached datasets, the last used first.

    Args:
        clear: delete all of them.
    """
    found = []
    for folder in _folder().glob("*/"):
        # Another version may have stored other facts.
        facts = read_facts(folder) or {}
        paths, num_rows = facts.get("paths", []), facts.get("num_rows", 0)
        size = sum(file.stat().st_size for file in folder.iterdir())
        found.append(CachedDataset(folder, paths, num_rows, size, folder.stat().st_mtime))
    if clear:
        shutil.rmtree(_folder(), ignore_errors=True)
    return sorted(found, key=lambda entry: -entry.used)


def _find_or_make(folder: Path, make: Callable[[Path], None]) -> tuple[PreparedData, bool]:
    import filelock

    folder.parent.mkdir(parents=True, exist_ok=True)
    # Processes that train together read what is there side by side, without the lock.
    prepared = PreparedData.open(folder)
    if prepared is None:
        # The first process prepares and the others wait here. The operating system releases the
        # lock of a process that dies.
        with filelock.FileLock(folder.with_suffix(".lock")):
            prepared = PreparedData.open(folder)
            if prepared is None:
                if folder.exists():
                    log.warning(
                        "%s: damaged (%s); its rows are prepared anew", folder, damaged_file(folder)
                    )
                with atomic_folder(folder, replace=True) as unfinished:
                    make(unfinished)
                return PreparedData.open_written(folder), False
    folder.touch()
    return prepared, True


def _folder() -> Path:
    return cache_folder() / "prepared"


def _code_digest() -> str:
    here = Path(__file__).parents[1]
    files = [here.parent / "types.py", *sorted(here.rglob("*.py"))]
    return hash_pieces(
        piece for path in files for piece in (f"{path.relative_to(here.parent)}\n".encode(), path)
    )


def read_data(
    name: str,
    data: Data,
    sources: list[Source],
    tokenizer: PreTrainedTokenizerFast,
    *,
    use_cache: bool = True,
    context: ModelContext | None = None,
    objective: ObjectiveSettings = SUPERVISED,
) -> PreparedData:
    """Load or prepare the examples of all sources, and log a line about them."""
    prepared, is_old = load_or_prepare(
        sources, tokenizer, data, use_cache=use_cache, context=context, objective=objective
    )
    log.info("%s data%s: %s", name, " (as prepared before)" if is_old else "", prepared.summary())
    return prepared
