"""Keep the inputs of layers in host memory until the backward pass.

With full checkpointing, these T x D values are all that a step keeps per layer. They are moved as
torch's `save_on_cpu` moves every tensor that autograd saves.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


class HostMemory(Protocol):
    """Host memory, separate from the device's."""

    def put(self, tensor: Tensor) -> Tensor:
        """Copy a tensor to the host."""
        ...

    def get(self, kept: Tensor, device: torch.device) -> Tensor:
        """Copy it back to the device."""
        ...


class PinnedHostMemory:
    """Pinned host memory of a CUDA device. Its copies are asynchronous, in the device's order."""

    def put(self, tensor: Tensor) -> Tensor:
        """Copy to pinned memory, which torch caches."""
        kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return kept.copy_(tensor, non_blocking=True)

    def get(self, kept: Tensor, device: torch.device) -> Tensor:
        """Copy back."""
        return kept.to(device, non_blocking=True)


def keep_on_host(decoder: nn.Module, embeddings: nn.Module, host: HostMemory) -> None:
    """Register hooks that keep the saved inputs of layers on the host.

    Args:
        decoder: the module of the layers, called once per forward pass.
        embeddings: the module that returns the input of the first layer.
    """
    inputs = _Inputs(host)
    decoder.register_forward_pre_hook(inputs.begin)
    embeddings.register_forward_hook(inputs.look)
    # Also after an error: what runs next must not be offloaded.
    decoder.register_forward_hook(inputs.end, always_call=True)


class _Inputs:
    """Hooks that recognise the inputs of layers by dtype and size, as saved tensors have no names.

    Another tensor of the same dtype and size would be moved too. That costs time and changes no
    result.
    """

    def __init__(self, host: HostMemory) -> None:
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
            return tensor.detach()  # the tensor itself would form a cycle with its graph
        return tensor.device, self._host.put(tensor)

    def _unpack(self, kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        device, copy = kept
        return self._host.get(copy, device)


def _form(tensor: Tensor) -> tuple[torch.dtype, int, int]:
    """Describe a tensor, the same for (1, T, D) and (T, D)."""
    width = tensor.shape[-1] if tensor.ndim else 1
    return tensor.dtype, tensor.numel(), width
