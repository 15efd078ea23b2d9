"""Read untrusted folders safely: models, adapters and runs of other people.

Nothing that is read in them lies outside of them, is pickled, or has no end. A name that a file
gives (a shard in an index, a tokenizer's file) is a name in the same folder and nothing more.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from qlora_cli.common.formatting import first_names
from qlora_cli.errors import ModelError

MAX_JSON_BYTES = 2**26
"""Limit of a JSON file. The index of the largest models has some megabytes."""
MAX_JSON_DEPTH = 64

PICKLED = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib"}
"""Suffixes of files that are pickles, or may be."""
_TEMPLATES = "additional_chat_templates"
"""The only subfolder of a model folder that transformers reads."""


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that contains an object.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not JSON, not an object, too large, or nested too deeply.
    """
    # A pipe would be waited for without end.
    if path.exists() and not path.is_file():
        raise ValueError("it is not a regular file")
    with path.open("rb") as file:
        data = file.read(MAX_JSON_BYTES + 1)
    if len(data) > MAX_JSON_BYTES:
        raise ValueError(f"it is larger than {MAX_JSON_BYTES >> 20} MiB")
    return object_of(data)


def object_of(data: bytes) -> dict[str, Any]:
    """Parse JSON that is an object.

    Raises:
        ValueError: it is not JSON, not an object, or nested too deeply.
    """
    try:
        found = json.loads(data)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(found, dict):
        raise ValueError(f"it holds a {type(found).__name__}, not an object")
    level: list[Any] = [found]
    for _ in range(MAX_JSON_DEPTH):
        level = [below for item in level for below in _inside(item)]
        if not level:
            return found
    raise ValueError(f"it is nested more than {MAX_JSON_DEPTH} deep")


def _inside(item: Any) -> Iterable[Any]:
    if isinstance(item, dict):
        return item.values()
    return item if isinstance(item, list) else ()


def refuse_foreign(folder: Path) -> None:
    """Refuse a model or adapter folder with a link or setting that leads out of it.

    Raises:
        ModelError: a link, or a name in an index or in the tokenizer's settings, does.
    """
    refuse_links(folder)
    refuse_links(folder / _TEMPLATES)
    for index in sorted(folder.glob("*.safetensors.index.json")):
        _refuse_shards(index)
    for name, file in _named_files(folder):
        if not _is_name_inside(name):
            raise ModelError(
                f"{file}: it names a file {name!r}, and only files of its own folder are read"
            )


def refuse_links(folder: Path) -> None:
    """Refuse a folder with a link that leads out of it.

    The Hub's cache consists of links from `snapshots/COMMIT` to its sibling `blobs`: these stay
    within one model, and are followed.
    """
    if not folder.is_dir():
        return
    inside = folder.resolve()
    allowed = [inside]
    if (snapshot := _snapshot_of(inside)) is not None:
        allowed.append(snapshot.parent.parent / "blobs")
    for entry in sorted(folder.iterdir()):
        if not entry.is_symlink():
            continue
        target = entry.resolve()
        if not any(target.is_relative_to(one) for one in allowed):
            raise ModelError(
                f"{entry} is a link out of its folder, to {target}",
                hint="put the file itself there, if it is yours; a link in a folder that was "
                "downloaded may be there to have another file read or overwritten",
            )


def _snapshot_of(folder: Path) -> Path | None:
    """Return the snapshot of the Hub's cache that a folder is or lies in."""
    for place in (folder, folder.parent):
        if place.parent.name == "snapshots":
            return place
    return None


def refuse_no_safetensors(folder: Path, what: str, names: Iterable[str] = ()) -> None:
    """Refuse a folder without weights that can be read without running code from them.

    Args:
        what: names it in the message.
        names: files, one of which is needed; any safetensors file will do if there are none.

    Raises:
        ModelError: there are none.
    """
    if any((folder / name).is_file() for name in names):
        return
    entries = sorted(folder.iterdir())
    if not names and any(entry.suffix == ".safetensors" for entry in entries):
        return
    shown = first_names([entry.name for entry in entries], 8) or "nothing"
    pickled = [entry.name for entry in entries if entry.suffix in PICKLED]
    hint = "name another folder or revision"
    if pickled:
        hint = (
            "convert them where a file that runs code can do no harm: "
            "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW) for a model, "
            "safetensors.torch.save_file(torch.load(FILE, weights_only=True), NEW) for an adapter"
        )
    raise ModelError(
        f"{what} has no safetensors weights (found: {shown}); pickled weights are never loaded, "
        "since a pickle can run any code",
        hint=hint,
    )


def refuse_code_elsewhere(folder: Path) -> None:
    """Refuse a model whose code is taken from another repository.

    Of that only the newest state would be run, whatever `revision` pins.
    """
    for name in ("config.json", "tokenizer_config.json"):
        if not (folder / name).is_file():
            continue
        code = _read(folder / name).get("auto_map")
        for place in _texts(code):
            if "--" in place:
                raise ModelError(
                    f"{folder / name}: auto_map takes code from {place.partition('--')[0]}, which "
                    "model.revision does not pin",
                    hint="name a folder with that code in it",
                )


def _refuse_shards(index: Path) -> None:
    places = _read(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ModelError(f"{index} cannot be read: it has no weight_map")
    for name in places.values():
        if not _is_name_inside(name):
            raise ModelError(
                f"{index}: weight_map names a file {name!r}, and only files of its own folder are "
                "read"
            )
        if not name.endswith(".safetensors"):
            raise ModelError(
                f"{index}: weight_map names {name}, which is not a safetensors file; pickled "
                "weights are never loaded, since a pickle can run any code",
                hint="AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW) converts "
                "them, where a file that runs code can do no harm",
            )


def _named_files(folder: Path) -> Iterator[tuple[object, Path]]:
    """Yield the paths in settings that transformers opens, in addition to files of fixed names."""
    tokenizer, config = folder / "tokenizer_config.json", folder / "config.json"
    if tokenizer.exists():
        listed = _read(tokenizer).get("fast_tokenizer_files") or []
        yield from ((name, tokenizer) for name in (listed if isinstance(listed, list) else [0]))
    if config.exists() and (weights := _read(config).get("transformers_weights")) is not None:
        raise ModelError(
            f"{config}: transformers_weights ({weights!r}) names a weights file that other "
            "programs do not look for; this key is not supported",
            hint="rename the file to model.safetensors, and remove the key",
        )


def _is_name_inside(name: object) -> bool:
    return (
        isinstance(name, str)
        and name not in ("", ".", "..")
        and not set(name) & {"/", "\\", ":", "\0"}
    )


def _texts(value: Any) -> Iterator[str]:
    """Yield all strings in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for below in _inside(value):
            yield from _texts(below)


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_object(path)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
