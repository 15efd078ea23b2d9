"""Capabilities that only some devices have."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from qlora_cli.kernels.attention import Attention, PerDocumentAttention, choose_attention
from qlora_cli.kernels.offload import HostMemory, PinnedHostMemory


@dataclass(frozen=True)
class DeviceCapabilities:
    """The attention kernel and the offload memory of a device."""

    attention: Attention = field(default_factory=PerDocumentAttention)
    host: HostMemory | None = None
    """Memory of the host, separate from the device's; None on a CPU."""

    @classmethod
    def of(cls, device: torch.device, dtype: torch.dtype) -> DeviceCapabilities:
        """Find the capabilities of a device for computing in a dtype."""
        host = PinnedHostMemory() if device.type == "cuda" else None
        return cls(choose_attention(device, dtype), host)
