"""The number of positions that a model was made for."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from qlora_cli.errors import DataError, ModelError
from qlora_cli.types import ModelContext, Prompt

log = logging.getLogger("qlora")

_NAMES = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "n_ctx")
"""Names of the number of positions in config.json, by how many models use each."""

_INCLUDED = {"default", "llama3", "longrope", "su", "mrope", "proportional"}
"""Kinds of rope scaling whose models already count the longer context in their positions."""

_LEARNED = {
    "biogpt", "ctrl", "gpt2", "gpt_bigcode", "gpt_neo", "openai-gpt", "opt",
}  # fmt: skip
"""Model types with a table of positions: a longer row has no position, and fails."""


def read_context(config: Mapping[str, Any], virtual_tokens: int = 0) -> ModelContext | None:
    """Return the context of a model; None if its config does not say.

    Args:
        config: the content of config.json.
        virtual_tokens: those that an adapter puts before each row. They take positions.

    Raises:
        ModelError: the virtual tokens take all positions.
    """
    length = _length(config)
    if length is None:
        return None
    if virtual_tokens >= length:
        raise ModelError(
            f"adapter.num_virtual_tokens ({virtual_tokens:,}): the model has {length:,} positions, "
            "so none is left for a row",
            hint=f"--set adapter.num_virtual_tokens={max(1, min(20, length // 2))}",
        )
    is_table = config.get("model_type") in _LEARNED
    return ModelContext(length - virtual_tokens, is_table, virtual_tokens)


def context_of(model: Any) -> ModelContext | None:
    """Return the context of a loaded model, less the virtual tokens of its active adapter.

    Raises:
        ModelError: the virtual tokens take all positions.
    """
    # `quiet_libraries` has to run before PEFT imports transformers.
    from peft import PeftModel

    number = 0
    if isinstance(model, PeftModel) and model.has_active_enabled_adapter:
        settings = model.active_peft_config
        number = settings.num_virtual_tokens if settings.is_prompt_learning else 0
    return read_context(model.config.to_dict(), number)


def limit_new_tokens(length: int, wanted: int, context: ModelContext | None) -> int:
    """Limit new tokens to what the context leaves after a prompt of this length.

    A prompt beyond the context, whose positions can be computed, gets all of them.
    """
    if context is None:
        return wanted
    room = context.length - length
    return wanted if room < 1 and not context.is_table else min(wanted, room)


def check_length(
    length: int, context: ModelContext | None, *, place: str = "", hint: str | None = None
) -> None:
    """Warn of a prompt that leaves no room in the context for an answer.

    Raises:
        DataError: no token fits, and the model has a table of positions.
    """
    if context is None or length < context.length:
        return
    problem = (
        f"{place}{': ' * bool(place)}the context is full: the prompt has {length:,} tokens, and "
        f"the model has room for {context.text}"
    )
    if context.is_table:
        raise DataError(problem, hint=hint)
    log.warning("%s: it was not trained on such positions%s", problem, f"; {hint}" * bool(hint))


def check_prompts(prompts: Sequence[Prompt], context: ModelContext | None) -> None:
    """Warn once of prompts that leave no room in the context for an answer.

    The message names the first of them by its place, or else by its number from 0.

    Raises:
        DataError: no token fits, and the model has a table of positions.
    """
    if context is None:
        return
    lengths = [len(prompt.input_ids) for prompt in prompts]
    full = [number for number, length in enumerate(lengths) if length >= context.length]
    if not full:
        return
    first = full[0]
    hint = "shorten the prompt, or remove it"
    if len(full) > 1:
        hint = f"{len(full)} prompts are as long as the context or longer; shorten or remove them"
    place = prompts[first].place or (f"prompt {first}" if len(prompts) > 1 else "")
    check_length(lengths[first], context, place=place, hint=hint)


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
