"""Check that a loaded tokenizer gives the tokens that its own file gives.

For some classes of tokenizer, transformers 5 builds normalizer and pre-tokenizer anew and ignores
those of tokenizer.json. A model whose file differs from its class would be trained, and served by
other programs, on different tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qlora_cli.errors import ModelError

log = logging.getLogger("qlora")

_HINT = (
    'if the file is right, set "tokenizer_class": "PreTrainedTokenizerFast" in the '
    "tokenizer_config.json of that folder"
)

PROBES = (
    "Hello world, it's 2024! I've 1234567 reasons; don't you?",
    "  two spaces,   three\ttab\n\nnew\r\n lines \n  and trailing  ",
    "x=3.14159; y[12]+=f(a_b, 'c')  # 100% of 1e-5, 0xFF\n    return {\"k\": [1, 22, 333, 4444]}",
    "ÀÉÎõü ﬁ ½ ① Ａ e\u0301 naïve café STRASSE straße İstanbul",
    "Привет, мир 42! Γειά σου Κόσμε. שלום עולם. مرحبا ١٢٣. नमस्ते दुनिया १२३",
    "你好,世界 123。こんにちは 世界!안녕하세요 세계. สวัสดีชาวโลก",
    "🙂👩‍👩‍👧 🇫🇷 … — “quotes” ‘single’ «guillemets» \u00a0nbsp\u200bzero",
    "https://example.org/a?b=c&d=1#e me@example.org $1,234.56 C++ C# camelCase snake_case",
)
"""Texts on which pre-tokenizers and normalizers differ: digits, spaces, contractions, scripts."""


def as_in_file(tokenizer: Any, folder: Path) -> Any:
    """Return the tokenizer of a folder that gives the tokens of the folder's tokenizer.json.

    It is `tokenizer` itself, or, where that gives other tokens, one that is loaded from the file
    alone.

    Raises:
        ModelError: this one gives other tokens than the file too.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    path = folder / "tokenizer.json"
    # The plain class takes the file as it is.
    if not path.is_file() or type(tokenizer) is PreTrainedTokenizerFast:
        return tokenizer
    stored = Tokenizer.from_file(str(path))
    text = first_difference(tokenizer, stored, PROBES)
    if text is None:
        return tokenizer
    plain: Any = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    kind = type(tokenizer).__name__
    if first_difference(plain, stored, PROBES) is None:
        log.warning(
            "%s: transformers loads it as %s, which splits text in another way than this file "
            "says; the file's tokens are used, as other programs do (%s)",
            path,
            kind,
            _example(tokenizer, stored, text),
        )
        return plain
    if first_difference(tokenizer, plain.backend_tokenizer, PROBES) is None:
        return tokenizer  # a setting in tokenizer_config.json changes what the file says
    raise ModelError(
        f"{path}: transformers loads it as {kind}, which gives other tokens than the file "
        f"({_example(tokenizer, stored, text)})",
        hint=_HINT,
    )


def require_as_in_file(tokenizer: Any, folder: Path, texts: Iterable[str]) -> None:
    """Refuse a tokenizer that gives other tokens for some texts than the folder's tokenizer.json.

    `as_in_file` compares on probes; this is for the rows of a run.

    Raises:
        ModelError: a text has other tokens.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    path = folder / "tokenizer.json"
    if not path.is_file() or type(tokenizer) is PreTrainedTokenizerFast:
        return
    stored = Tokenizer.from_file(str(path))
    has_config_tokens = stored.get_vocab() != tokenizer.get_vocab()
    if has_config_tokens or first_difference(tokenizer, stored, PROBES) is not None:
        return  # tokenizer_config.json changes what the file says
    if (text := first_difference(tokenizer, stored, texts)) is not None:
        raise ModelError(
            f"{path}: transformers loads it as {type(tokenizer).__name__}, which gives other "
            f"tokens than the file for a row of the data ({_example(tokenizer, stored, text)})",
            hint=_HINT,
        )


def first_difference(tokenizer: Any, stored: Any, texts: Iterable[str]) -> str | None:
    """Return the first text for which two tokenizers give different ids, without the special
    tokens that stand around a text.

    Args:
        tokenizer: of transformers.
        stored: of the tokenizers library.
    """
    for text in texts:
        if _ids(tokenizer, text) != stored.encode(text, add_special_tokens=False).ids:
            return text
    return None


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _example(tokenizer: Any, stored: Any, text: str) -> str:
    """Show the tokens of the shortest part of a text that differ."""
    for word in (*text.split(), text):
        file_ids, ids = stored.encode(word, add_special_tokens=False).ids, _ids(tokenizer, word)
        if ids != file_ids:
            break
    file_tokens, tokens = (
        " ".join(stored.id_to_token(i) or str(i) for i in some) for some in (file_ids, ids)
    )
    return f"{word!r} is {file_tokens} in the file and {tokens} there"
