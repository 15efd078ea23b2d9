"""The number of positions that a model was made for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qlora_cli.types import ModelContext

_NAMES = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "n_ctx")
"""Names of the number of positions in config.json, by how many models use each."""

_INCLUDED = {"default", "llama3", "longrope", "su", "mrope", "proportional"}
"""Kinds of rope scaling whose models already count the longer context in their positions."""

_LEARNED = {
    "biogpt", "ctrl", "gpt2", "gpt_bigcode", "gpt_neo", "openai-gpt", "opt",
}  # fmt: skip
"""Model types with a table of positions: a longer row has no position, and fails."""


def read_context(config: Mapping[str, Any]) -> ModelContext | None:
    """Return the context of a model; None if its config does not say.

    Args:
        config: the content of config.json.
    """
    length = _length(config)
    if length is None:
        return None
    return ModelContext(length, is_table=config.get("model_type") in _LEARNED)


def _length(config: Mapping[str, Any]) -> int | None:
    nested = config.get("text_config")
    config = nested if isinstance(nested, Mapping) else config
    found = next((n for name in _NAMES if _is_count(n := config.get(name))), None)
    if found is None:
        return None
    scaling = config.get("rope_scaling") or config.get("rope_parameters")
    if not isinstance(scaling, Mapping):
        return int(found)
    kind, factor = scaling.get("rope_type", scaling.get("type")), scaling.get("factor")
    if kind in _INCLUDED or not isinstance(factor, int | float) or factor <= 1:
        return int(found)
    # Some configs count the scaled positions, and some the original ones.
    original = scaling.get("original_max_position_embeddings")
    unscaled = original if isinstance(original, int) else int(found)
    return max(int(found), int(factor * unscaled))


def _is_count(value: object) -> bool:
    return type(value) is int and value > 0
