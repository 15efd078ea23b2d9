"""What some devices can do for a step, and others cannot."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from qlora_cli.kernels.attention import Attention, PerDocumentAttention, choose_attention
from qlora_cli.kernels.offload import Host, PinnedHost


@dataclass(frozen=True)
class DeviceCapabilities:
    """What a device has for a step beside arithmetic."""

    attention: Attention = field(default_factory=PerDocumentAttention)
    host: Host | None = None
    """Memory beside that of the device; None on a CPU, which has one memory."""

    @classmethod
    def of(cls, device: torch.device, dtype: torch.dtype) -> DeviceCapabilities:
        """Of a device that is computed on in a dtype."""
        host = PinnedHost() if device.type == "cuda" else None
        return cls(choose_attention(device, dtype), host)
