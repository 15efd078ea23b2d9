"""Unpack GGUF files to bfloat16."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import shutil
from pathlib import Path

from qlora_cli._compat import restore_splitting
from qlora_cli.common.atomic_files import atomic_folder, replace_file
from qlora_cli.common.cache_folder import cache_folder
from qlora_cli.common.formatting import size_text
from qlora_cli.common.hashing import hash_file, hash_once
from qlora_cli.common.untrusted_files import read_object
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
    folder = _folder_of(path)
    # Processes that train together read what is there side by side, without the lock.
    if damaged_file(folder) is None:
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    # The first process unpacks, and the others wait.
    with filelock.FileLock(folder.with_suffix(".lock")):
        damaged = damaged_file(folder)
        if damaged is None:
            return folder
        if not folder.exists():
            log.info("unpacking %s to bfloat16 in %s (once)", path.name, folder)
        elif not _manifest_of(folder).exists():
            log.info(
                "%s was unpacked by an earlier version, which kept no digests; %s is unpacked anew "
                "(once)",
                folder,
                path.name,
            )
        else:
            log.warning("%s: damaged (%s); %s is unpacked anew", folder, damaged, path.name)
        _write_unpacked(path, folder)
    return folder


def unpacked_config(path: Path) -> Path | None:
    """Return the folder of a GGUF file that is unpacked already, if its config.json is intact."""
    folder = _folder_of(path)
    return folder if damaged_file(folder, only="config.json") is None else None


def damaged_file(folder: Path, *, only: str | None = None) -> str | None:
    """Read an unpacked folder, and return the name of a file that is not as it was written, if any.

    Args:
        only: read this file alone.
    """
    manifest = _manifest_of(folder)
    try:
        files = read_object(manifest)
        names = set(_files_in(folder))
        if names != files.keys():
            return min(names ^ files.keys())
        for name in sorted(names) if only is None else [only]:
            if hash_once(folder / name) != files[name]:
                return name
    except (OSError, ValueError):
        return manifest.name
    return None


def _folder_of(path: Path) -> Path:
    return cache_folder() / "gguf" / f"{hash_once(path)[:32]}-{_FORMAT_VERSION}"


def _files_in(folder: Path) -> list[str]:
    return [str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()]


def _manifest_of(folder: Path) -> Path:
    """Return the file that lists the digests of an unpacked folder."""
    return folder.with_suffix(".json")


def _write_unpacked(path: Path, folder: Path) -> None:
    import torch
    from transformers import AutoTokenizer, GgufConfig

    # transformers would believe a config or tokenizer in the same folder, not the file. The name is
    # fixed, so that the next run removes what a kill left behind.
    alone = folder.with_name(f".{folder.name}.alone")
    shutil.rmtree(alone, ignore_errors=True)
    alone.mkdir()
    try:
        with atomic_folder(folder, replace=True) as unfinished:
            _refuse_too_large(path)
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
            # Read back now; the name of the folder comes last, so it always has its digests.
            digests = {name: hash_file(unfinished / name) for name in _files_in(unfinished)}
            replace_file(_manifest_of(folder), json.dumps(digests))
    except ModelError:
        raise
    # A damaged file raises any kind of error, deep in the libraries that read it.
    except Exception as error:
        raise ModelError(f"model.path: {path} cannot be read as a model: {error}") from error
    finally:
        shutil.rmtree(alone, ignore_errors=True)


def _refuse_too_large(path: Path) -> None:
    """Refuse a file whose weights do not fit this machine's free memory in 16 bit.

    transformers holds all of them at once, so unpacking would end in the middle, without a message.

    Raises:
        ModelError: it does not fit.
    """
    import psutil
    from gguf import GGUFReader

    needed = 2 * sum(int(tensor.n_elements) for tensor in GGUFReader(path).tensors)
    free = psutil.virtual_memory().available + psutil.swap_memory().free
    if needed > free:
        raise ModelError(
            f"model.path: {path} has {size_text(needed)} of weights in bfloat16, in which it is "
            f"unpacked, and {size_text(free)} of memory and swap are free here",
            hint="unpack it on a machine with more memory and copy its cache "
            f"({cache_folder() / 'gguf'}), or use the model's safetensors files",
        )
