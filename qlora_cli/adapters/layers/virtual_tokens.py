"""Virtual tokens: trained vectors that stand before the tokens of each row.

PEFT inserts them around the whole model, so the output is longer than the input. Here hooks insert
them at the decoder's input and remove them from its output, so losses, tasks and generation need
not know of them. PEFT still holds and saves them.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from peft import PeftModel, PeftType
from torch import Tensor, nn

from qlora_cli.common.decoder import decoder_of
from qlora_cli.common.eval_mode import eval_mode

_KINDS = (PeftType.PROMPT_TUNING, PeftType.PREFIX_TUNING)


def insert_virtual_tokens(model: PeftModel) -> None:
    """Insert the active virtual tokens of a model before the input of its decoder.

    Args:
        model: a plain `PeftModel` around a causal language model.

    Raises:
        ValueError: the kind of virtual tokens is not supported, or the decoder is not known.
    """
    kind = model.active_peft_config.peft_type
    if kind not in _KINDS:
        raise ValueError(f"virtual tokens of the kind {kind.value} are not supported")
    base = model.get_base_model()
    decoder = decoder_of(base)
    if decoder is None:
        raise ValueError("transformers does not know which part of this model is its decoder")
    tokens = (_PromptHooks if kind == PeftType.PROMPT_TUNING else _PrefixHooks)(model, decoder)
    decoder.register_forward_pre_hook(tokens.before, with_kwargs=True)
    decoder.register_forward_hook(tokens.after)


def virtual_token_weight(model: PeftModel) -> nn.Parameter:
    """Return the trained weight: (V, D) for a prompt, (V, 2 * layers * D) for a prefix."""
    weight: nn.Parameter = model.prompt_encoder[model.active_adapter].embedding.weight
    return weight


class _DecoderHooks:
    """Hooks before and after the forward of a decoder."""

    def __init__(self, model: PeftModel, decoder: nn.Module) -> None:
        self._model = model
        self._decoder: Any = decoder
        self._names = list(inspect.signature(decoder.forward).parameters)

    def before(self, _: nn.Module, args: Any, options: Any) -> tuple[Any, Any] | None:
        """Return the input of the decoder (B, T) with V virtual tokens before it.

        Raises:
            ValueError: a row has several examples, or the mask is not (B, T).
        """
        self._reset()
        if not self._model.has_active_enabled_adapter:
            return None
        given: dict[str, Any] = {**dict(zip(self._names, args, strict=False)), **options}
        if given.get("documents"):
            raise ValueError("virtual tokens stand before a row, and this row has several examples")
        number = self._model.active_peft_config.num_virtual_tokens
        cache = given.get("past_key_values")
        # In later steps of a generation they are already in the cache.
        is_first = cache is None or cache.get_seq_length() == 0
        if (mask := given.get("attention_mask")) is not None:
            if mask.dim() != 2:
                raise ValueError("virtual tokens need an attention mask of shape (rows, tokens)")
            given["attention_mask"] = torch.cat([mask.new_ones(len(mask), number), mask], 1)
        if (positions := given.get("position_ids")) is not None:
            given["position_ids"] = positions + number  # (..., T)
        if is_first:
            self._insert(given, number)
        return (), given

    def after(self, _: nn.Module, args: Any, output: Any) -> Any:
        """Return the output of the decoder, as long as its input."""
        return output

    def _reset(self) -> None:
        raise NotImplementedError

    def _insert(self, given: dict[str, Any], number: int) -> None:
        raise NotImplementedError


class _PromptHooks(_DecoderHooks):
    """Insert embeddings before those of the row (Lester et al. 2021)."""

    def _reset(self) -> None:
        self._number = 0

    def _insert(self, given: dict[str, Any], number: int) -> None:
        embedded = given.get("inputs_embeds")  # (B, T, D)
        if embedded is None:
            embedded = self._decoder.get_input_embeddings()(given["input_ids"])
        weight = virtual_token_weight(self._model).to(embedded.dtype)
        first = weight.expand(len(embedded), -1, -1)
        given["inputs_embeds"] = torch.cat([first, embedded], 1)  # (B, V + T, D)
        given["input_ids"] = None
        if (positions := given.get("position_ids")) is not None:
            before = torch.arange(number, device=positions.device)
            before = before.expand(*positions.shape[:-1], number)
            given["position_ids"] = torch.cat([before, positions], -1)
        self._number = number

    def after(self, _: nn.Module, args: Any, output: Any) -> Any:
        """Drop the output at the virtual tokens: (B, V + T, D) -> (B, T, D)."""
        if self._number:
            output.last_hidden_state = output.last_hidden_state[:, self._number :]
        return output


class _PrefixHooks(_DecoderHooks):
    """Insert keys and values in every layer, before those of the row (Li & Liang 2021)."""

    def __init__(self, model: PeftModel, decoder: nn.Module) -> None:
        super().__init__(model, decoder)
        for module in decoder.modules():
            if hasattr(module, "layer_idx"):
                module.register_forward_pre_hook(self._when_recomputed, with_kwargs=True)

    def _reset(self) -> None:
        self._layers: list[tuple[Tensor, Tensor]] = []

    def _insert(self, given: dict[str, Any], number: int) -> None:
        from transformers import DynamicCache

        embedded = given.get("inputs_embeds")
        device = (given["input_ids"] if embedded is None else embedded).device
        rows = len(given["input_ids"] if embedded is None else embedded)
        dtype = self._model.get_base_model().dtype
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        heads = self._model.active_peft_config.num_attention_heads
        # PEFT's order: V, then keys and values of each layer in turn, then heads.
        halves = (
            virtual_token_weight(self._model)
            .to(dtype)
            .view(number, -1, 2, heads, self._size(heads))
        )
        for layer in halves.permute(1, 2, 3, 0, 4):  # (2, H, V, D) of each
            keys, values = (half.expand(rows, -1, -1, -1) for half in layer)
            self._layers.append((keys, values))
        if given.get("past_key_values") is None:
            given["past_key_values"] = DynamicCache(config=self._decoder.config)
        for index, (keys, values) in enumerate(self._layers):
            given["past_key_values"].update(keys, values, index)

    def _size(self, heads: int) -> int:
        return int(self._model.active_peft_config.token_dim) // heads

    def _when_recomputed(
        self, module: nn.Module, args: Any, options: Any
    ) -> tuple[Any, Any] | None:
        """Give a recomputed layer its own keys and values.

        With gradient checkpointing, transformers passes no cache to a layer in the backward pass,
        because the cache would already hold what the forward pass put into it.
        """
        is_without = "past_key_values" in options and options["past_key_values"] is None
        if not self._layers or not is_without:
            return None
        index: Any = module.layer_idx
        return args, {**options, "past_key_values": _LayerPrefix(*self._layers[index])}


class _LayerPrefix:
    """A read-only cache of one layer that holds the prefix."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self._keys, self._values = keys, values

    def update(
        self, keys: Tensor, values: Tensor, *_: object, **options: object
    ) -> tuple[Tensor, Tensor]:
        """Return keys and values with the prefix before them: (B, H, T, D) -> (B, H, V + T, D)."""
        return torch.cat([self._keys, keys], 2), torch.cat([self._values, values], 2)


@torch.no_grad()
def initialize_from_words(model: PeftModel) -> None:
    """Initialize a prefix with the keys and values of V words drawn from the vocabulary.

    Li & Liang (section 7.4) find that random vectors train worse. Draws from torch's generator.
    """
    base = model.get_base_model()
    number = model.active_peft_config.num_virtual_tokens
    words = torch.randint(base.get_input_embeddings().weight.shape[0], (1, number))
    with eval_mode(base), model.disable_adapter():
        cache = base(input_ids=words.to(base.device), use_cache=True).past_key_values
    halves = [half[0] for layer in cache for half in layer[:2]]  # (H, V, D) of each
    virtual_token_weight(model).copy_(torch.stack(halves).permute(2, 0, 1, 3).flatten(1))
