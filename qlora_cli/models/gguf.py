"""Unpack GGUF files to bfloat16."""

from __future__ import annotations

import contextlib
import io
import logging
import shutil
from functools import lru_cache
from pathlib import Path

from qlora_cli._compat import restore_splitting
from qlora_cli.common.atomic_files import atomic_folder
from qlora_cli.common.cache_folder import cache_folder
from qlora_cli.common.hashing import hash_file
from qlora_cli.errors import ModelError
from qlora_cli.models.heads import CAUSAL_LM
from qlora_cli.models.tokenizer_files import save_plainly

log = logging.getLogger("qlora")

_FORMAT_VERSION = 4
"""Increase it when files are unpacked in another way than before."""


def unpack_gguf(path: Path) -> Path:
    """Dequantize a GGUF file into a folder in bfloat16, once for each content of the file.

    Raises:
        ModelError: there is no such file, or it cannot be read as a model.
    """
    import filelock

    if not path.is_file():
        raise ModelError(f"model.path: no such file: {path}")
    folder = unpacked_folder(path)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # With several processes or runs the first unpacks, and the others wait.
    with filelock.FileLock(folder.with_suffix(".lock")):
        if not folder.is_dir():
            log.info("unpacking %s to bfloat16 in %s (once)", path.name, folder)
            _write_unpacked(path, folder)
    return folder


def unpacked_folder(path: Path) -> Path:
    """Return the folder of an unpacked GGUF file, whether it exists or not."""
    found = path.stat()
    digest = _hash_once(path, found.st_size, found.st_mtime_ns)
    return cache_folder() / "gguf" / f"{digest[:32]}-{_FORMAT_VERSION}"


@lru_cache(maxsize=16)
def _hash_once(path: Path, size: int, changed: int) -> str:
    """Hash a file of this size and time of change: a run asks for its base several times."""
    return hash_file(path)


def _write_unpacked(path: Path, folder: Path) -> None:
    import torch
    from transformers import AutoTokenizer, GgufConfig

    # transformers would believe a config or tokenizer in the same folder, not the file. The name is
    # fixed, so that the next run removes what a kill left behind.
    alone = folder.with_name(f".{folder.name}.alone")
    shutil.rmtree(alone, ignore_errors=True)
    alone.mkdir()
    try:
        with atomic_folder(folder) as unfinished:
            (alone / path.name).symlink_to(path.resolve())
            # Its progress bar cannot be switched off, and is not an error.
            with contextlib.redirect_stderr(io.StringIO()):
                model = CAUSAL_LM.auto_class().from_pretrained(
                    alone,
                    gguf_file=path.name,
                    quantization_config=GgufConfig(dequantize=True),
                    dtype=torch.bfloat16,
                    local_files_only=True,
                )
            tokenizer = AutoTokenizer.from_pretrained(
                alone, gguf_file=path.name, local_files_only=True
            )
            restore_splitting(tokenizer, path)
            model.save_pretrained(unfinished)
            save_plainly(tokenizer, unfinished)
    # A damaged file raises any kind of error, deep in the libraries that read it.
    except Exception as error:
        raise ModelError(f"model.path: {path} cannot be read as a model: {error}") from error
    finally:
        shutil.rmtree(alone, ignore_errors=True)
