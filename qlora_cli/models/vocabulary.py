"""Check that every token that training may meet has a row in the model's embedding."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_cli.common.formatting import first_names
from qlora_cli.common.untrusted_files import read_object
from qlora_cli.errors import ModelError
from qlora_cli.models.tokenizer import as_ids, templates_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerFast

log = logging.getLogger("qlora")

_GENERATION_KEYS = ("eos_token_id", "pad_token_id", "bos_token_id")
_MAX_NAMED = 3


def embedding_rows(folder: Path, *, trust_remote_code: bool = False) -> int | None:
    """Return the number of rows of a model's embedding, from its config.json.

    Returns:
        The number, or None where the config does not have it.

    Raises:
        ModelError: the config cannot be read.
    """
    from transformers import AutoConfig

    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
    # Inconsistent settings raise any kind of error, wherever they are first used.
    except Exception as error:
        raise ModelError(f"model.path: {folder} cannot be read: {error}") from error
    rows = getattr(config.get_text_config(decoder=True), "vocab_size", None)
    return rows if isinstance(rows, int) else None


def check_vocabulary(tokenizer: PreTrainedTokenizerFast, rows: int, folder: Path) -> None:
    """Refuse tokens without a row in the embedding, if training or generation may meet them.

    Such a token would be an IndexError in the middle of training, and on CUDA a device-side assert.
    A special token that no template writes may lack a row: Gemma 3's text models have one, for
    images.

    Args:
        rows: rows of the embedding.
        folder: the model folder.

    Raises:
        ModelError: the tokenizer or the generation config has such a token.
    """
    missing = {token: i for token, i in tokenizer.get_vocab().items() if i >= rows}
    if needed := {token: i for token, i in missing.items() if _may_occur(tokenizer, token, i)}:
        named = [f"{token!r} ({i})" for token, i in sorted(needed.items(), key=lambda at: at[1])]
        largest = max(needed.values())
        raise ModelError(
            f"model.path: the tokenizer in {folder} has {len(tokenizer)} tokens, with ids up to "
            f"{largest}, and the model's embedding has {rows} rows; tokens without a row: "
            f"{len(needed)}, such as {first_names(named, _MAX_NAMED)}",
            hint="use the tokenizer that belongs to this model; or add rows for the new tokens, "
            f"with transformers: model.resize_token_embeddings({largest + 1}), then "
            "model.save_pretrained(NEW) and tokenizer.save_pretrained(NEW)",
        )
    if missing:
        log.info(
            "%s: no row in the embedding for %s, which no row of the data can contain",
            folder,
            first_names(sorted(missing), _MAX_NAMED),
        )
    for key, token_id in _generation_ids(folder):
        if token_id >= rows:
            raise ModelError(
                f"model.path: {folder / 'generation_config.json'}: {key} ({token_id}) is not a "
                f"token of the model: its embedding has {rows} rows (0 to {rows - 1})",
                hint=f"correct {key} there; the tokenizer's is {getattr(tokenizer, key)}",
            )


def _may_occur(tokenizer: Any, token: str, token_id: int) -> bool:
    """Tell whether text, the chat template or padding can bring a token into a row."""
    added = tokenizer.added_tokens_decoder.get(token_id)
    if added is None or not added.special:
        return True
    used = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    return token_id in used or any(token in text for text in templates_of(tokenizer))


def _generation_ids(folder: Path) -> Iterator[tuple[str, int]]:
    """Yield the token ids that a folder's generation_config.json names."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return
    try:
        found = read_object(path)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    for key in _GENERATION_KEYS:
        yield from ((key, one) for one in as_ids(found.get(key)) if type(one) is int)
