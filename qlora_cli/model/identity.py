"""Which base model this is, wherever it lies: to tell whether an adapter belongs to it."""

from __future__ import annotations

import hashlib
from pathlib import Path

from qlora_cli.foreign import read_object
from qlora_cli.model.shards import Shards

_SAMPLE = 4096
"""Bytes of each tensor that are looked at. Models of one shape (base and instruction-tuned) differ
in nearly every weight, and reading all of a large model would take minutes."""


def identify(folder: Path) -> dict[str, str]:
    """What is recorded of a base model.

    Returns:
        {"architecture", "digest"}: the digest is of names, dtypes, shapes and the first bytes of
        all tensors, so it does not depend on how they are shared out among files.
    """
    config = read_object(folder / "config.json")
    architectures = config.get("architectures")
    named = architectures if isinstance(architectures, list) else []
    architecture = str([*named, config.get("model_type", "unknown")][0])
    digest = hashlib.sha256()
    shards = Shards(folder)
    for name, stored in sorted(shards.tensors.items()):
        digest.update(f"{name} {stored.dtype} {list(stored.shape)} ".encode())
        digest.update(shards.beginning(name, _SAMPLE))
    return {"architecture": architecture, "digest": digest.hexdigest()}
