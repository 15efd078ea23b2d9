"""Inputs of layers that wait in the memory of the host for the backward pass.

With everything else computed again, they are what a step keeps for each layer of a model: T x D
values. What torch's `save_on_cpu` does to all that autograd saves is done to them alone.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


class Host(Protocol):
    """Memory beside that of the device."""

    def put(self, tensor: Tensor) -> Tensor:
        """A copy there."""
        ...

    def get(self, kept: Tensor, device: torch.device) -> Tensor:
        """The copy, on the device again."""
        ...


class PinnedHost:
    """The host of a CUDA device. Nobody waits for a copy: memory that is pinned is copied in the
    order of the device's own work."""

    def put(self, tensor: Tensor) -> Tensor:
        """Into pinned memory, of which torch keeps what it once had."""
        kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return kept.copy_(tensor, non_blocking=True)

    def get(self, kept: Tensor, device: torch.device) -> Tensor:
        """Back."""
        return kept.to(device, non_blocking=True)


def keep_on_host(decoder: nn.Module, embeddings: nn.Module, host: Host) -> None:
    """From now on, what layers save of their inputs is on the host till their backward pass.

    Args:
        decoder: the layers, called once in a forward pass.
        embeddings: what gives the input of the first of them.
    """
    inputs = _Inputs(host)
    decoder.register_forward_pre_hook(inputs.begin)
    embeddings.register_forward_hook(inputs.look)
    # Also after an error: what is done next must not be saved in this way.
    decoder.register_forward_hook(inputs.end, always_call=True)


class _Inputs:
    """Knows the inputs of layers by their form: autograd gives no name to what it saves. Another
    tensor of the same form would be moved too, which costs time and changes no result."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._form: tuple[torch.dtype, int, int] | None = None
        self._hooks = saved_tensors_hooks(self._pack, self._unpack)

    def begin(self, *_: Any) -> None:
        self._form = None
        self._hooks.__enter__()

    def look(self, _: nn.Module, __: Any, embedded: Tensor) -> None:
        self._form = _form(embedded)

    def end(self, *_: Any) -> None:
        self._hooks.__exit__(None, None, None)

    def _pack(self, tensor: Tensor) -> Any:
        if _form(tensor) != self._form:
            return tensor.detach()  # itself, it would be held by what it holds
        return tensor.device, self._host.put(tensor)

    def _unpack(self, kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        device, copy = kept
        return self._host.get(copy, device)


def _form(tensor: Tensor) -> tuple[torch.dtype, int, int]:
    """The same for (1, T, D) and (T, D)."""
    width = tensor.shape[-1] if tensor.ndim else 1
    return tensor.dtype, tensor.numel(), width
