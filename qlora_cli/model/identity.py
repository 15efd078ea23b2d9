"""Which base model this is, wherever it lies: to tell whether an adapter belongs to it."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

_SAMPLE = 4096
"""Bytes of each tensor that are looked at. Models of one shape (base and instruction-tuned) differ
in nearly every weight, and reading all of a large model would take minutes."""


def identify(folder: Path) -> dict[str, str]:
    """What is recorded of a base model.

    Returns:
        {"architecture", "digest"}: the digest is of names, dtypes, shapes and the first bytes of
        all tensors, so it does not depend on how they are shared out among files.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    architecture = (config.get("architectures") or [config.get("model_type", "unknown")])[0]
    digest = hashlib.sha256()
    tensors = (tensor for file in folder.glob("*.safetensors") for tensor in _tensors(file))
    for name, described in sorted(tensors):
        digest.update(f"{name} ".encode() + described)
    return {"architecture": architecture, "digest": digest.hexdigest()}


def _tensors(path: Path) -> list[tuple[str, bytes]]:
    """Each tensor of a safetensors file, with its dtype, shape and first bytes."""
    found = []
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header: dict[str, Any] = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            file.seek(8 + length + start)
            sample = file.read(min(_SAMPLE, end - start))
            found.append((name, f"{entry['dtype']} {entry['shape']} ".encode() + sample))
    return found
