"""Find the halves of a language model: its decoder, and a head that scores rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

SCORE = "score"
"""Name of the head in transformers' sequence classifiers that are made from a decoder."""

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


def decoder_of(model: PreTrainedModel) -> nn.Module | None:
    """Return the layers below the head, or None if transformers does not know them.

    `get_decoder` goes by names. ModernBERT's decoder calls its head `decoder`, and Llama 4 has none
    of the names, so that it returns the model itself.
    """
    causal: Any = model
    decoder: nn.Module | None = causal.get_decoder()
    if decoder is not None and decoder is causal.get_output_embeddings():
        decoder = causal.base_model
    return None if decoder is model else decoder


def score_layer(model: nn.Module) -> Any:
    """Return the head of a sequence classifier; None for a model with another head."""
    return getattr(model, SCORE, None)
