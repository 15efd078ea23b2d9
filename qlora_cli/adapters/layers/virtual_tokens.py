"""Virtual tokens: trained numbers that stand before the tokens of each row.

PEFT puts them in around the whole model, so that what comes back is longer than what was given.
Here the decoder is given them, and its output is without them: whoever asks a model (loss, tasks,
generation) need not know of them. How they are held and saved is PEFT's.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from peft import PeftModel, PeftType
from torch import Tensor, nn

_KINDS = (PeftType.PROMPT_TUNING, PeftType.PREFIX_TUNING)


def insert_virtual_tokens(model: PeftModel) -> None:
    """Let the active virtual tokens of a model stand before whatever its decoder is given.

    Args:
        model: PEFT's plain model around a causal language model.

    Raises:
        ValueError: it is another kind of virtual tokens, or a model whose decoder is not known.
    """
    kind = model.active_peft_config.peft_type
    if kind not in _KINDS:
        raise ValueError(f"virtual tokens of the kind {kind.value} are not known here")
    base = model.get_base_model()
    decoder = base.get_decoder()
    if decoder is None or decoder is base:
        raise ValueError("transformers does not say which part of this model is its decoder")
    tokens = (_Prompt if kind == PeftType.PROMPT_TUNING else _Prefix)(model, decoder)
    decoder.register_forward_pre_hook(tokens.before, with_kwargs=True)
    decoder.register_forward_hook(tokens.after)


def weight_of(model: PeftModel) -> nn.Parameter:
    """What is trained: (V, D) of a prompt, (V, 2 * layers * D) of a prefix."""
    weight: nn.Parameter = model.prompt_encoder[model.active_adapter].embedding.weight
    return weight


class _VirtualTokens:
    def __init__(self, model: PeftModel, decoder: nn.Module) -> None:
        self._model = model
        self._decoder: Any = decoder
        self._names = list(inspect.signature(decoder.forward).parameters)

    def before(self, _: nn.Module, args: Any, options: Any) -> tuple[Any, Any] | None:
        """The input of the decoder (B, T), with V virtual tokens before it.

        Raises:
            ValueError: several examples are in a row, or the mask is no plain one.
        """
        self._forget()
        if not self._model.has_active_enabled_adapter:
            return None
        given: dict[str, Any] = {**dict(zip(self._names, args, strict=False)), **options}
        if given.get("documents"):
            raise ValueError("virtual tokens stand before a row, and this one has several examples")
        number = self._model.active_peft_config.num_virtual_tokens
        cache = given.get("past_key_values")
        # Later steps of a generation find them in the cache.
        is_first = cache is None or cache.get_seq_length() == 0
        if (mask := given.get("attention_mask")) is not None:
            if mask.dim() != 2:
                raise ValueError("virtual tokens need a mask of rows and tokens")
            given["attention_mask"] = torch.cat([mask.new_ones(len(mask), number), mask], 1)
        if (positions := given.get("position_ids")) is not None:
            given["position_ids"] = positions + number  # (..., T)
        if is_first:
            self._put(given, number)
        return (), given

    def after(self, _: nn.Module, args: Any, output: Any) -> Any:
        """The output of the decoder, as long as its input was."""
        return output

    def _forget(self) -> None:
        raise NotImplementedError

    def _put(self, given: dict[str, Any], number: int) -> None:
        raise NotImplementedError


class _Prompt(_VirtualTokens):
    """Embeddings before those of the row (Lester et al. 2021)."""

    def _forget(self) -> None:
        self._number = 0

    def _put(self, given: dict[str, Any], number: int) -> None:
        embedded = given.get("inputs_embeds")  # (B, T, D)
        if embedded is None:
            embedded = self._decoder.get_input_embeddings()(given["input_ids"])
        weight = weight_of(self._model).to(embedded.dtype)
        first = weight.expand(len(embedded), -1, -1)
        given["inputs_embeds"] = torch.cat([first, embedded], 1)  # (B, V + T, D)
        given["input_ids"] = None
        if (positions := given.get("position_ids")) is not None:
            before = torch.arange(number, device=positions.device)
            before = before.expand(*positions.shape[:-1], number)
            given["position_ids"] = torch.cat([before, positions], -1)
        self._number = number

    def after(self, _: nn.Module, args: Any, output: Any) -> Any:
        """(B, V + T, D) -> (B, T, D)."""
        if self._number:
            output.last_hidden_state = output.last_hidden_state[:, self._number :]
        return output


class _Prefix(_VirtualTokens):
    """Keys and values in every layer, before those of the row (Li & Liang 2021)."""

    def __init__(self, model: PeftModel, decoder: nn.Module) -> None:
        super().__init__(model, decoder)
        for module in decoder.modules():
            if hasattr(module, "layer_idx"):
                module.register_forward_pre_hook(self._where_recomputed, with_kwargs=True)

    def _forget(self) -> None:
        self._layers: list[tuple[Tensor, Tensor]] = []

    def _put(self, given: dict[str, Any], number: int) -> None:
        from transformers import DynamicCache

        embedded = given.get("inputs_embeds")
        device = (given["input_ids"] if embedded is None else embedded).device
        rows = len(given["input_ids"] if embedded is None else embedded)
        dtype = self._model.get_base_model().dtype
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        heads = self._model.active_peft_config.num_attention_heads
        # PEFT's order: V, then keys and values of each layer in turn, then heads.
        halves = weight_of(self._model).to(dtype).view(number, -1, 2, heads, self._size(heads))
        for layer in halves.permute(1, 2, 3, 0, 4):  # (2, H, V, D) of each
            keys, values = (half.expand(rows, -1, -1, -1) for half in layer)
            self._layers.append((keys, values))
        if given.get("past_key_values") is None:
            given["past_key_values"] = DynamicCache(config=self._decoder.config)
        for index, (keys, values) in enumerate(self._layers):
            given["past_key_values"].update(keys, values, index)

    def _size(self, heads: int) -> int:
        return int(self._model.active_peft_config.token_dim) // heads

    def _where_recomputed(
        self, module: nn.Module, args: Any, options: Any
    ) -> tuple[Any, Any] | None:
        """A layer that is computed again in the backward pass is given no cache by transformers,
        which would then hold what the first time put into it. It gets its own keys and values."""
        is_without = "past_key_values" in options and options["past_key_values"] is None
        if not self._layers or not is_without:
            return None
        index: Any = module.layer_idx
        return args, {**options, "past_key_values": _Before(*self._layers[index])}


class _Before:
    """As a cache of one layer, which is not changed."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self._keys, self._values = keys, values

    def update(
        self, keys: Tensor, values: Tensor, *_: object, **options: object
    ) -> tuple[Tensor, Tensor]:
        """(B, H, T, D) of each -> (B, H, V + T, D)."""
        return torch.cat([self._keys, keys], 2), torch.cat([self._values, values], 2)


@torch.no_grad()
def initialize_from_words(model: PeftModel) -> None:
    """Let a prefix begin with the keys and values of words that are drawn from the vocabulary.

    Li & Liang (section 7.4) find that numbers drawn at random learn worse. One word for each of the
    V virtual tokens, by torch's generator.
    """
    base = model.get_base_model()
    number = model.active_peft_config.num_virtual_tokens
    words = torch.randint(base.get_input_embeddings().weight.shape[0], (1, number))
    was_training = base.training
    base.eval()
    with model.disable_adapter():
        cache = base(input_ids=words.to(base.device), use_cache=True).past_key_values
    base.train(was_training)
    halves = [half[0] for layer in cache for half in layer[:2]]  # (H, V, D) of each
    weight_of(model).copy_(torch.stack(halves).permute(2, 0, 1, 3).flatten(1))
