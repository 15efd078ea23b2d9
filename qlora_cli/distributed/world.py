"""The processes that train together. The only importer of accelerate."""

from __future__ import annotations

import contextlib
import random
import re
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Literal, TypeVar

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import Tensor, nn

from qlora_cli.common.formatting import size_text
from qlora_cli.distributed.cuda import (
    CudaState,
    configure_cuda,
    refuse_unsupported_card,
    refuse_unusable_card,
)
from qlora_cli.distributed.idle_threads import share_cpu
from qlora_cli.distributed.precision import PRECISIONS, cpu_is_fast_in_bfloat16, no_bfloat16
from qlora_cli.types import DeviceChoice

T = TypeVar("T")

_TIMEOUT = timedelta(hours=2)
"""How long ranks wait for each other: the main one evaluates, plans and saves by itself."""


class World:
    """Device, rank and sums over ranks. One process is a world of size 1.

    Args:
        device: `auto` is the accelerator that torch finds, or else the CPU.

    Raises:
        RecipeError: the machine has a card that torch cannot use.
    """

    def __init__(self, device: DeviceChoice = "auto") -> None:
        is_cpu = device == "cpu" or not torch.accelerator.is_available()
        if device == "auto" and is_cpu:
            refuse_unusable_card(CudaState())
        # With `cpu=True` several CPU processes form a group; otherwise each would be alone.
        self._accelerator = Accelerator(
            cpu=is_cpu,
            kwargs_handlers=[
                # Gradients are views of the exchange buckets: otherwise they would be in memory
                # twice during an update. Frozen weights are the same on all ranks: each reads the
                # same files, and the adapter is made with the same seed.
                DistributedDataParallelKwargs(
                    gradient_as_bucket_view=True, broadcast_buffers=False
                ),
                InitProcessGroupKwargs(timeout=_TIMEOUT),
            ],
        )
        self.device: torch.device = self._accelerator.device
        if self.is_cuda:
            found = torch.cuda.get_device_properties(self.device)
            refuse_unsupported_card(
                found.name, (found.major, found.minor), torch.cuda.get_arch_list()
            )
            configure_cuda()
        if self.device.type == "cpu":
            share_cpu()
        self.rank: int = self._accelerator.process_index
        self.size: int = self._accelerator.num_processes

    @property
    def is_cuda(self) -> bool:
        """Tell if this process computes on a CUDA device."""
        return self.device.type == "cuda"

    @property
    def is_main(self) -> bool:
        """Tell if this process writes files and logs."""
        return self.rank == 0

    def summary(self) -> str:
        """Name the device, its memory and the number of processes, for the log."""
        if self.is_cuda:
            found = torch.cuda.get_device_properties(self.device)
            driver = CudaState().driver
            name = (
                f"{found.name}, {size_text(found.total_memory)}, sm_{found.major}{found.minor}, "
                f"CUDA {torch.version.cuda}" + (f", driver {driver}" if driver else "")
            )
        elif self.device.type == "cpu":
            free = psutil.virtual_memory().available
            name = f"CPU, {torch.get_num_threads()} threads, {size_text(free)} free"
        else:
            name = self.device.type
        return name if self.size == 1 else f"{self.size} x {name}"

    def sum(self, value: Tensor) -> Tensor:
        """Return the sum of a tensor over all ranks."""
        if self.size == 1:
            return value
        total: Tensor = self._accelerator.reduce(value.clone(), reduction="sum")
        return total

    def sum_on_host(self, counts: Tensor) -> list[int]:
        """Return the sums of host counters over all ranks. One process does not use the device."""
        if self.size == 1:
            return [int(count) for count in counts]
        return [int(count) for count in self.sum(counts.to(self.device))]

    def any(self, flag: bool) -> bool:
        """Tell if the flag is set on any rank. One process does not use the device."""
        return self.sum_on_host(torch.tensor([int(flag)]))[0] > 0

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks (plain Python and tensors), in rank order."""
        from accelerate.utils import gather_object

        found: list[T] = gather_object([value]) if self.size > 1 else [value]
        return found

    def share(self, module: nn.Module) -> nn.Module:
        """Wrap a module so that its backward pass averages gradients over ranks.

        Frozen weights are not sent around at the start: each rank has read the same files.
        """
        if self.size == 1:
            return module
        # The wrapper looks for this attribute; a 70B base would be 37 GB for each rank to receive.
        module._ddp_params_and_buffers_to_ignore = frozen_names(module)  # type: ignore[assignment]
        shared: nn.Module = self._accelerator.prepare_model(module, device_placement=False)
        return shared

    def no_sync(self, module: nn.Module, *, last: bool) -> AbstractContextManager[object]:
        """Skip the exchange of gradients unless it is the last micro-batch of the step."""
        if last or self.size == 1:
            return contextlib.nullcontext()
        waiting: AbstractContextManager[object] = self._accelerator.no_sync(module)
        return waiting

    def wait(self) -> None:
        """Wait until every rank has called this."""
        self._accelerator.wait_for_everyone()

    def close(self) -> None:
        """Leave the group of processes, if there is one."""
        self._accelerator.end_training()

    def compute_dtype(self, precision: Literal["auto", "bf16", "fp16", "fp32"]) -> torch.dtype:
        """Return the dtype that `training.precision` means on this device.

        Raises:
            RecipeError: the recipe says bf16, and the GPU does not have it.
        """
        if precision == "auto":
            return self._best_dtype()
        dtype = next(dtype for dtype, name in PRECISIONS.items() if name == precision)
        if not self.computes_in(dtype):
            raise no_bfloat16(f"this {self.device.type}")
        return dtype

    def _best_dtype(self) -> torch.dtype:
        if self.device.type == "cpu":
            return torch.bfloat16 if cpu_is_fast_in_bfloat16() else torch.float32
        return torch.bfloat16 if self.computes_in(torch.bfloat16) else torch.float16

    def computes_in(self, dtype: torch.dtype) -> bool:
        """Tell if the device computes in a dtype. A CPU does in all, in some by emulation."""
        if dtype != torch.bfloat16 or not self.is_cuda:
            return True
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))

    def free_memory(self) -> None:
        """Return the allocator's cached memory to the device."""
        if self.is_cuda:
            torch.cuda.empty_cache()

    def peak_memory(self) -> dict[str, int]:
        """Return the peak memory of this process by name, as metrics.jsonl records it.

        On CUDA there is also what the allocator held; a part of it was in no tensor.
        """
        found = {"peak_memory_bytes": self.peak_memory_bytes()}
        if self.is_cuda:
            found["reserved_memory_bytes"] = torch.cuda.max_memory_reserved(self.device)
        return found

    def peak_memory_bytes(self) -> int:
        """Return the peak memory of this process: allocated on the GPU, else resident."""
        if self.is_cuda:
            return torch.cuda.max_memory_allocated(self.device)
        import resource
        import sys

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def frozen_names(module: nn.Module) -> list[str]:
    """Return the names of the weights that are not trained."""
    return [name for name, one in module.named_parameters() if not one.requires_grad]


def is_out_of_memory(error: BaseException) -> bool:
    """Tell if an error of torch or Python means that memory ran out.

    torch raises its own class for its CUDA allocator alone. Memory of cuBLAS, cuDNN and
    bitsandbytes, pinned and managed memory, and that of a CPU end in a RuntimeError.
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and bool(_OUT_OF_MEMORY.search(str(error)))


_OUT_OF_MEMORY = re.compile(
    r"can't allocate memory|out of memory|ALLOC_FAILED|cudaErrorMemoryAllocation", re.IGNORECASE
)


def set_seed(seed: int) -> None:
    """Seed every random generator that a run uses."""
    import numpy as np

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
