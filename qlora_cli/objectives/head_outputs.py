"""The outputs of a head that scores rows, at the last token of each row."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from qlora_cli.common.decoder import decoder_of, score_layer
from qlora_cli.errors import ModelError
from qlora_cli.objectives.halves import run_halves
from qlora_cli.objectives.token_losses import without_adapter
from qlora_cli.types import Batch, copy_to


class HeadOutputs:
    """Computes the head of a sequence classifier at the last token of each example.

    transformers computes the head for every token, and finds the last one by the id of the pad
    token. Here it is found by position, and the head computes in float32.

    Args:
        model: a sequence classifier, with or without PEFT around it.
        dtype: autocast dtype of the decoder; float32 means no autocast.

    Raises:
        ModelError: the model does something else between its decoder and its head.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self._dtype = dtype
        classifier: Any = without_adapter(model)
        decoder, head = decoder_of(classifier), score_layer(classifier)
        assert head is not None, "the model was loaded with a head that scores rows"
        if decoder is None or not self._is_split(classifier, decoder, head):
            raise ModelError(
                f"objective: {type(classifier).__name__} changes the states of its decoder before "
                "its head, which is not supported",
                hint="choose a base of another architecture, such as Llama, Qwen, Mistral or Gemma",
            )
        self._decoder, self._head = decoder, head

    def __call__(self, batch: Batch) -> Tensor:
        """Return the outputs for each example, (S, K) in float32, with a gradient."""
        device = batch.input_ids.device
        with self._autocast(device):
            hidden = self._decoder(**batch.inputs(), use_cache=False).last_hidden_state  # (B, T, D)
        states = hidden.flatten(0, 1)[last_positions(batch)]  # (S, D)
        with torch.autocast(device.type, enabled=False):
            outputs: Tensor = self._head(states.float())
            return outputs

    def _autocast(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, self._dtype, enabled=self._dtype != torch.float32)

    def _is_split(self, classifier: nn.Module, decoder: nn.Module, head: nn.Module) -> bool:
        """Check that the head reads the states of the decoder as they are."""
        autocast = self._autocast(next(classifier.parameters()).device)
        found = run_halves(classifier, decoder, head, autocast)
        return found is not None and torch.equal(found.decoded, found.read)


def last_positions(batch: Batch) -> Tensor:
    """Return the position of the last token of each example, (S,), of the flattened B * T.

    It is computed where the batch is, so that the host does not wait.
    """
    device = batch.input_ids.device
    if batch.documents:
        return copy_to(device, torch.tensor(list(accumulate(batch.documents))) - 1)
    assert batch.attention_mask is not None
    rows, length = batch.input_ids.shape
    places = torch.arange(length, device=device)
    last = (batch.attention_mask * places).argmax(1)  # rows may be padded on either side
    return torch.arange(rows, device=device) * length + last
