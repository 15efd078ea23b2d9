"""Which base model this is, wherever it lies: to tell whether an adapter belongs to it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from qlora_cli.common.hashing import hash_pieces
from qlora_cli.common.untrusted_files import read_object
from qlora_cli.errors import ModelError
from qlora_cli.models.shards import Shards

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
    return {"architecture": architecture, "digest": hash_pieces(_samples(Shards(folder)))}


def _samples(shards: Shards) -> Iterator[bytes]:
    for name, stored in sorted(shards.tensors.items()):
        yield f"{name} {stored.dtype} {list(stored.shape)} ".encode()
        yield shards.beginning(name, _SAMPLE)


def refuse_other_base(
    path: Path | str,
    base: Mapping[str, str] | None,
    trained_on: str,
    model_path: str,
    here: Mapping[str, str],
) -> None:
    """Weights of equal shapes fit each other, whatever they are.

    Args:
        path: of what was trained, as the user named it.
        base: what `identify` said of the base when it was trained; None if nobody knows.
        trained_on: what that base was called.
        model_path: what the base that is there now is called.
        here: what `identify` says of that.

    Raises:
        ModelError: it is known to be another one.
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
            f"{path} was trained on {trained_on}, and here is {model_path}, {other} "
            f"({base['digest'][:12]} -> {here['digest'][:12]})",
            hint="what was trained belongs to the weights that it was trained on; "
            "--set model.path=... names them, wherever they lie now",
        )
