"""Capabilities that only some devices have."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from qlora_cli.kernels.attention import Attention, PerDocumentAttention, choose_attention
from qlora_cli.kernels.cross_entropy import LossChunks
from qlora_cli.kernels.offload import HostMemory, PinnedHostMemory


@dataclass(frozen=True)
class DeviceCapabilities:
    """The attention kernel and the offload memory of a device."""

    attention: Attention = field(default_factory=PerDocumentAttention)
    host: HostMemory | None = None
    """Memory of the host, separate from the device's; None on a CPU."""

    @property
    def block_values(self) -> int:
        """Values that an element-wise function computes at a time (`Elementwise.in_blocks`).

        On a CPU, a block should fit the cache of a core: that was 1.4 to 6 times as fast as all
        rows at once (`dev/LOG.md`). On a card, smaller blocks would wait for the launch of each
        operation.
        """
        return 2**18 if self.host is None else 2**22

    @property
    def loss_chunks(self) -> LossChunks:
        """Rows of logits to compute at a time."""
        return LossChunks.on("cpu" if self.host is None else "cuda")

    @classmethod
    def of(cls, device: torch.device, dtype: torch.dtype) -> DeviceCapabilities:
        """Find the capabilities of a device for computing in a dtype."""
        host = PinnedHostMemory() if device.type == "cuda" else None
        return cls(choose_attention(device, dtype), host)
