"""Write the files of a tokenizer and of generation settings as the base model has them.

transformers would write them in its own form: with a class of tokenizer that only its version 5
knows, and with the settings of this load. Other programs (transformers 4, vLLM, llama.cpp) read the
base's files, so what training did not change is copied byte for byte.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_cli.common.untrusted_files import read_object
from qlora_cli.errors import ModelError
from qlora_cli.models.tokenizer import as_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

TEMPLATE = "chat_template.jinja"
GENERATION = "generation_config.json"
_CONFIG = "tokenizer_config.json"
_SPECIAL_TOKENS = "special_tokens_map.json"
_PATTERNS = (
    "tokenizer*", _SPECIAL_TOKENS, "added_tokens.json", "vocab.*", "merges.txt",
    "spiece.model", "sentencepiece*.model", "tekken.json", "tokenization_*.py", TEMPLATE,
    "additional_chat_templates/*",
)  # fmt: skip
_OF_THIS_LOAD = {"tokenizer_class", "is_local", "local_files_only", "name_or_path", "backend"}
"""Settings that transformers 5 writes about the load, and not about the tokenizer."""
_ANY_CLASS = "PreTrainedTokenizerFast"
"""The class that reads tokenizer.json alone. All versions of transformers know it."""


def tokenizer_files(folder: Path) -> Iterator[Path]:
    """Yield the files of the tokenizer in a model or adapter folder."""
    for pattern in _PATTERNS:
        yield from (path for path in sorted(folder.glob(pattern)) if path.is_file())


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, base: Path, folder: Path) -> None:
    """Write a tokenizer into `folder`: the base's own files, with what differs from them.

    Args:
        base: the folder that holds the base's tokenizer.

    Raises:
        ModelError: the base's settings cannot be read.
    """
    if _has_same_tokens(tokenizer, base):
        for path in tokenizer_files(base):
            target = folder / path.relative_to(base)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)
        _write_template(tokenizer.chat_template, base, folder)
        _write_pad_token(tokenizer, folder)
    else:
        tokenizer.save_pretrained(folder)
        _write_config(folder, {**_read(base / _CONFIG), **_without_load(_read(folder / _CONFIG))})


def save_plainly(tokenizer: Any, folder: Path) -> None:
    """Write a tokenizer that has no files of its own, so that all versions of transformers read it.

    transformers 4 takes `extra_special_tokens` for a mapping, and a list is an error there.
    """
    tokenizer.save_pretrained(folder)
    config = _without_load(_read(folder / _CONFIG))
    extra = config.pop("extra_special_tokens", None)
    if isinstance(extra, list) and extra:
        config["additional_special_tokens"] = extra
    _write_config(folder, {**config, "tokenizer_class": _ANY_CLASS})


def save_generation_config(model: PreTrainedModel, base: Path, folder: Path) -> None:
    """Write the generation settings: the base's own, with the model's stop tokens.

    A model that scores rows does not generate, and has none.

    Raises:
        ModelError: the base's settings cannot be read.
    """
    if not model.can_generate():
        return
    if (base / GENERATION).is_file():
        copy_generation_config(base, as_ids(model.generation_config.eos_token_id), folder)
    else:
        model.generation_config.save_pretrained(folder)


def copy_generation_config(base: Path, stops: Iterable[int], folder: Path) -> None:
    """Copy the base's generation settings, which exist, with these stop tokens.

    Raises:
        ModelError: the base's settings cannot be read.
    """
    settings, wanted = _read(base / GENERATION), sorted(set(stops))
    if sorted(set(as_ids(settings.get("eos_token_id")))) == wanted:
        shutil.copyfile(base / GENERATION, folder / GENERATION)
        return
    settings["eos_token_id"] = wanted[0] if len(wanted) == 1 else wanted
    text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    (folder / GENERATION).write_text(text, encoding="utf-8")


def stored_template(folder: Path) -> object:
    """Return the chat template in the files of a folder: a text, several, or None."""
    if (folder / TEMPLATE).is_file():
        return (folder / TEMPLATE).read_text(encoding="utf-8")
    return _read(folder / _CONFIG).get("chat_template")


def _has_same_tokens(tokenizer: Any, base: Path) -> bool:
    """Tell whether a tokenizer has the tokens of the base's files, under the same ids."""
    from tokenizers import Tokenizer

    path = base / "tokenizer.json"
    if not path.is_file():
        return True  # it was made from other files, and nothing in a run adds tokens
    stored = Tokenizer.from_file(str(path))
    return bool(stored.get_vocab() == tokenizer.get_vocab())


def _write_template(template: object, base: Path, folder: Path) -> None:
    """Write a chat template that is not the base's own to where the base has its own."""
    if not isinstance(template, str) or template == stored_template(base):
        return
    if (folder / TEMPLATE).is_file():
        (folder / TEMPLATE).write_text(template, encoding="utf-8")
    config = _read(folder / _CONFIG)
    if "chat_template" in config or not (folder / TEMPLATE).is_file():
        _write_config(folder, {**config, "chat_template": template})


def _write_pad_token(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a pad token that is neither the base's own nor the EOS, which stands for none."""
    if tokenizer.pad_token == tokenizer.eos_token:
        return
    for path in (folder / _CONFIG, folder / _SPECIAL_TOKENS):
        settings = _read(path)
        known = settings.get("pad_token")
        known = known.get("content") if isinstance(known, dict) else known
        if path.is_file() and known != tokenizer.pad_token:
            settings["pad_token"] = tokenizer.pad_token
            _write(path, settings)


def _without_load(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in _OF_THIS_LOAD}


def _write_config(folder: Path, config: dict[str, Any]) -> None:
    _write(folder / _CONFIG, config)


def _write(path: Path, settings: dict[str, Any]) -> None:
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _read(path: Path) -> dict[str, Any]:
    """Read a JSON file; a missing one is empty.

    Raises:
        ModelError: it cannot be read.
    """
    try:
        return read_object(path) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
