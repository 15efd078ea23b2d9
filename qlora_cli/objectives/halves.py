"""The results of the decoder and of the head of a model, from one forward pass."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qlora_cli.common.eval_mode import eval_mode


@dataclass(frozen=True, slots=True)
class Halves:
    """Tensors of one forward pass: a second pass may round otherwise on a GPU."""

    decoded: Tensor
    """Output of the decoder."""
    read: Tensor
    """Input of the head."""
    output: Tensor
    """Output of the head."""
    logits: Tensor
    """Output of the whole model."""


@torch.no_grad()
def run_halves(
    model: nn.Module, decoder: nn.Module, head: nn.Module, autocast: AbstractContextManager[Any]
) -> Halves | None:
    """Run a model on four tokens; None if it does not call both halves."""
    device = next(model.parameters()).device
    input_ids = torch.arange(1, 5, device=device)[None]  # (1, 4)
    seen: dict[str, Any] = {}

    def keep(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        seen[name] = inputs, output

    hooks = [
        half.register_forward_hook(partial(keep, name))
        for name, half in (("decoder", decoder), ("head", head))
    ]
    try:
        with eval_mode(model), autocast:
            logits = model(input_ids=input_ids, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    if seen.keys() != {"decoder", "head"}:
        return None
    (read, *_), output = seen["head"]
    return Halves(seen["decoder"][1].last_hidden_state, read, output, logits)
