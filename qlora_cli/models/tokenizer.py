"""Load tokenizers, and the tokens that end an answer."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from qlora_cli.common.jinja_sandbox import refuse_endless
from qlora_cli.common.untrusted_files import (
    read_object,
    refuse_foreign,
)
from qlora_cli.errors import ModelError
from qlora_cli.models.tokenizer_check import as_in_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerFast:
    """Load the tokenizer of a model or adapter folder.

    Raises:
        ModelError: it cannot be loaded, has a link that leads out of the folder, is not a fast
            tokenizer (masks need offsets into the text), or gives other tokens than its file.
    """
    from transformers import AutoTokenizer

    refuse_foreign(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
        if tokenizer.is_fast:
            tokenizer = as_in_file(tokenizer, folder)
    except ModelError:
        raise
    # A damaged file raises any kind of error; the tokenizers library raises Exception itself.
    except Exception as error:
        raise ModelError(f"no usable tokenizer in {folder}: {error}") from error
    if not tokenizer.is_fast:
        raise ModelError(
            f"{type(tokenizer).__name__} in {folder} is not a fast tokenizer: it has no offsets"
        )
    if tokenizer.pad_token_id is None:
        # Padding is masked by position and never by id, so the id can be shared.
        tokenizer.pad_token = tokenizer.eos_token
    for template in templates_of(tokenizer):
        refuse_endless(template, f"the chat template in {folder}")
    return cast("PreTrainedTokenizerFast", tokenizer)


def choose_pad_token(tokenizer: PreTrainedTokenizerFast, last_tokens: Collection[int]) -> None:
    """Give a tokenizer a pad token that no row ends with.

    A sequence classifier of transformers reads the last token that is not the pad token: with the
    EOS as the pad token, it would read the one before the end of the row.

    Args:
        last_tokens: the tokens that rows end with.

    Raises:
        ModelError: the tokenizer has no such special token.
    """
    special = [tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id]
    special += sorted(tokenizer.added_tokens_decoder)
    refused = {tokenizer.eos_token_id, None, *last_tokens}
    if (found := next((one for one in special if one not in refused), None)) is None:
        raise ModelError(
            "the tokenizer has no special token that could be the pad token: rows end with each of "
            "them, and a sequence classifier would not find the last token of a row",
            hint="add a token to the base, such as <|pad|>, and resize its embedding",
        )
    tokenizer.pad_token = str(tokenizer.convert_ids_to_tokens(found))


def templates_of(tokenizer: Any) -> list[str]:
    """Return all chat templates: a tokenizer has none, one, or several by name."""
    found = tokenizer.chat_template or {}
    return list(found.values()) if isinstance(found, dict) else [found]


def stop_token_ids(folder: Path) -> list[int]:
    """Return the ids of the tokens that end generation, from a folder's generation_config.json.

    Without that file, or without stop tokens in it, the list is empty.

    Raises:
        ModelError: its generation_config.json cannot be read.
    """
    path = folder / "generation_config.json"
    if not path.is_file():
        return []
    try:
        found = as_ids(read_object(path).get("eos_token_id"))
        if not all(type(one) is int for one in found):
            raise ValueError(f"eos_token_id ({found}) does not hold token ids")
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    return found


def as_ids(token_ids: int | list[int] | None) -> list[int]:
    """Return a list of token ids: a generation config has none, one, or several."""
    return token_ids if isinstance(token_ids, list) else [] if token_ids is None else [token_ids]


def set_stop_tokens(model: PreTrainedModel, stop_token_ids: Iterable[int]) -> None:
    """Make generation stop at every token that the training data ends answers with, too.

    A model that scores rows does not generate, and has no generation config.
    """
    if not model.can_generate():
        return
    known = as_ids(model.generation_config.eos_token_id)
    model.generation_config.eos_token_id = sorted({*known, *stop_token_ids})
