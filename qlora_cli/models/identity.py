"""Identify a base model by its content, to tell whether an adapter belongs to it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from qlora_cli.common.hashing import hash_pieces
from qlora_cli.common.untrusted_files import read_object
from qlora_cli.errors import ModelError
from qlora_cli.models.shards import Shards

_SAMPLE = 4096
"""Bytes of each tensor that are hashed. Models of one shape (base and instruction-tuned) differ in
nearly every weight, and reading all of a large model would take minutes."""


def identify(folder: Path) -> dict[str, str]:
    """Return what a run records about its base model.

    Returns:
        {"architecture", "digest"}: the digest covers names, dtypes, shapes and the first bytes of
        all tensors. It does not depend on how they are split into files.
    """
    config = read_object(folder / "config.json")
    architectures = config.get("architectures")
    named = architectures if isinstance(architectures, list) else []
    architecture = str([*named, config.get("model_type", "unknown")][0])
    return {"architecture": architecture, "digest": hash_pieces(_samples(Shards(folder)))}


def _samples(shards: Shards) -> Iterator[bytes]:
    for name, stored in sorted(shards.tensors.items()):
        yield f"{name} {stored.dtype} {list(stored.shape)} ".encode()
        yield shards.read_start(name, _SAMPLE)


def refuse_other_base(
    path: Path | str,
    base: Mapping[str, str] | None,
    trained_on: str,
    model_path: str,
    here: Mapping[str, str],
) -> None:
    """Refuse to use trained weights with a base that they were not trained on.

    Without this check they would be applied to any base of equal shapes.

    Args:
        path: the trained weights, as the user named them.
        base: what `identify` returned for their base; None if that is unknown.
        trained_on: the name of that base.
        model_path: the name of the base that is used now.
        here: what `identify` returns for it.

    Raises:
        ModelError: it is another base.
    """
    if base is None:
        return
    if base["architecture"] != here["architecture"]:
        raise ModelError(
            f"{path} was trained on a {base['architecture']} ({trained_on}), and {model_path} is a "
            f"{here['architecture']}"
        )
    if base["digest"] != here["digest"]:
        other = "which has changed since" if trained_on == model_path else "which has other weights"
        raise ModelError(
            f"{path} was trained on {trained_on}, but the base is now {model_path}, {other} "
            f"({base['digest'][:12]} -> {here['digest'][:12]})",
            hint="give the base that it was trained on: --set model.path=... (any place will do)",
        )
