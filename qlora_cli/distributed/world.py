"""The processes that train together. The only importer of accelerate."""

from __future__ import annotations

import contextlib
import random
from contextlib import AbstractContextManager
from typing import Literal, TypeVar

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn

from qlora_cli.common.formatting import size_text
from qlora_cli.distributed.precision import PRECISIONS, cpu_is_fast_in_bfloat16, no_bfloat16

T = TypeVar("T")


class World:
    """Device, rank and sums over ranks. One process is a world of size 1."""

    def __init__(self) -> None:
        # With `cpu=True` several CPU processes form a group; otherwise each would be alone.
        self._accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(),
            # Gradients are views of the exchange buckets: otherwise they would be in memory twice
            # during an update.
            kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
        )
        self.device: torch.device = self._accelerator.device
        self.rank: int = self._accelerator.process_index
        self.size: int = self._accelerator.num_processes

    @property
    def is_main(self) -> bool:
        """Tell if this process writes files and logs."""
        return self.rank == 0

    def summary(self) -> str:
        """Name the device, its memory and the number of processes, for the log."""
        if self.device.type == "cuda":
            found = torch.cuda.get_device_properties(self.device)
            name = f"{found.name}, {size_text(found.total_memory)}"
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
        """Wrap a module so that its backward pass averages gradients over ranks."""
        if self.size == 1:
            return module
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
        if precision == "bf16" and not self._has_bfloat16():
            raise no_bfloat16(f"this {self.device.type}")
        return next(dtype for dtype, name in PRECISIONS.items() if name == precision)

    def _best_dtype(self) -> torch.dtype:
        if self.device.type == "cpu":
            return torch.bfloat16 if cpu_is_fast_in_bfloat16() else torch.float32
        return torch.bfloat16 if self._has_bfloat16() else torch.float16

    def _has_bfloat16(self) -> bool:
        # Every CPU has it, some by emulation.
        return self.device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)

    def free_memory(self) -> None:
        """Return the allocator's cached memory to the device."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def peak_memory_bytes(self) -> int:
        """Return the peak memory of this process: allocated on the GPU, else resident."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        import resource
        import sys

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def is_out_of_memory(error: BaseException) -> bool:
    """Tell if an error of torch or Python means that memory ran out."""
    # Torch has no class of its own for it on a CPU.
    is_cpu = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return is_cpu or isinstance(error, torch.OutOfMemoryError | MemoryError)


def set_seed(seed: int) -> None:
    """Seed every random generator that a run uses."""
    import numpy as np

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
