"""The files of a merged model apart from its weights: written as in the base, and verified."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_cli.common.digests import DIGESTS
from qlora_cli.common.untrusted_files import PICKLED, read_object
from qlora_cli.errors import ModelError
from qlora_cli.export.merge_shards import ShardMerger
from qlora_cli.models.tokenizer import as_ids, load_tokenizer, stop_token_ids
from qlora_cli.models.tokenizer_check import PROBES, first_difference
from qlora_cli.models.tokenizer_files import GENERATION, copy_generation_config, save_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_WEIGHT_FILES = {".safetensors", ".h5", ".msgpack", ".onnx", ".gguf", ".ot"} | PICKLED


def write_files(
    base_folder: Path,
    trained: Path,
    tokenizer: PreTrainedTokenizerFast,
    plan: ShardMerger,
    folder: Path,
) -> None:
    """Write every file except the weights: the base's own, then tokenizer and generation config as
    trained.

    config.json is written last: until it exists, no program takes the folder for a model.
    """
    for file in _others(base_folder):
        shutil.copyfile(file, folder / file.name)
    save_tokenizer(tokenizer, base_folder, folder)
    if plan.head is not None:  # it does not generate
        (folder / GENERATION).unlink(missing_ok=True)
    elif (base_folder / GENERATION).is_file():
        copy_generation_config(base_folder, stop_token_ids(trained), folder)
    else:
        shutil.copyfile(trained / GENERATION, folder / GENERATION)
    if plan.vocab_size is not None:
        refuse_larger_tokenizer(tokenizer, plan.vocab_size)
    config = read_object(base_folder / "config.json")
    if not _change_config(config, plan, tokenizer):
        shutil.copyfile(base_folder / "config.json", folder / "config.json")
        return
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def verify_files(
    base_folder: Path,
    trained: Path,
    tokenizer: PreTrainedTokenizerFast,
    plan: ShardMerger,
    folder: Path,
) -> None:
    """Read the written files back, and compare them with those of the base.

    Raises:
        ModelError: config, generation config, tokenizer or chat template differ from the base in
            more than training changed, or a copied file differs.
    """
    config = read_object(base_folder / "config.json")
    _change_config(config, plan, tokenizer)
    if read_object(folder / "config.json") != config:
        raise ModelError(
            f"{folder / 'config.json'} differs from the base's in more than the merge changed"
        )
    if plan.head is None:
        _verify_generation(base_folder, trained, folder)
    written = load_tokenizer(folder)
    grown = plan.vocab_size is not None
    if not grown and written.get_vocab() != load_tokenizer(base_folder).get_vocab():
        raise ModelError(f"{folder}: the tokenizer's vocabulary is not the base's")
    if (text := first_difference(written, tokenizer.backend_tokenizer, PROBES)) is not None:
        raise ModelError(f"{folder}: {text!r} gives other tokens than in training")
    if written.chat_template != tokenizer.chat_template:
        raise ModelError(f"{folder}: the chat template is not that of training")
    for name in ("eos_token", "bos_token", "pad_token", "unk_token"):
        if getattr(written, name) != getattr(tokenizer, name):
            raise ModelError(f"{folder}: {name} is {getattr(written, name)}, not as in training")


def refuse_larger_tokenizer(tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> None:
    """Refuse a tokenizer with more tokens than the model has embeddings.

    Raises:
        ModelError: there are tokens without an embedding.
    """
    if len(tokenizer) > vocab_size:
        raise ModelError(
            f"the tokenizer has {len(tokenizer)} tokens and the merged model {vocab_size}"
        )


def _others(base_folder: Path) -> Iterator[Path]:
    """Yield the base's files that are neither weights nor written by another function."""
    for file in sorted(base_folder.iterdir()):
        is_weight = file.suffix in _WEIGHT_FILES or file.name.endswith(".index.json")
        is_written = file.name in ("config.json", "README.md", DIGESTS)
        if file.is_file() and not is_weight and not is_written:
            yield file


def _change_config(
    config: dict[str, Any], plan: ShardMerger, tokenizer: PreTrainedTokenizerFast
) -> bool:
    """Put into a config what the merge changed: untied weights, a larger vocabulary, and a head.

    A sequence classifier finds the last token of a row by the pad token's id.

    Returns:
        True if anything was changed.
    """
    for section in [config, *(value for value in config.values() if isinstance(value, dict))]:
        if plan.untied and (section is config or "tie_word_embeddings" in section):
            section["tie_word_embeddings"] = False
        if plan.vocab_size is not None and "vocab_size" in section:
            section["vocab_size"] = plan.vocab_size
        if plan.head is not None and (section is config or "vocab_size" in section):
            section["pad_token_id"] = tokenizer.pad_token_id
    if plan.head is not None:
        # As a JSON file has it: the keys of `id2label` are texts.
        config.update(json.loads(json.dumps(plan.head.config)))
    return bool(plan.untied) or plan.vocab_size is not None or plan.head is not None


def _verify_generation(base_folder: Path, trained: Path, folder: Path) -> None:
    """Check that the generation settings are the base's, with the stop tokens of training."""
    path = folder / GENERATION
    if stop_token_ids(folder) != stop_token_ids(trained):
        raise ModelError(f"{path}: eos_token_id is not that of training")
    if not (base_folder / GENERATION).is_file():
        return
    written, base = read_object(path), read_object(base_folder / GENERATION)
    if missing := set(as_ids(base.get("eos_token_id"))) - set(stop_token_ids(folder)):
        raise ModelError(f"{path}: eos_token_id lacks {sorted(missing)} of the base")
    if {**written, "eos_token_id": None} != {**base, "eos_token_id": None}:
        raise ModelError(f"{path} differs from the base in more than its stop tokens")
