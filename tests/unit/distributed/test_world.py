from pathlib import Path

import pytest
import torch

from qlora_cli.distributed.world import World, frozen_names, is_out_of_memory, set_seed


def test_one_process_sums_to_its_own_values() -> None:
    world = World()
    assert (world.size, world.rank, world.is_main) == (1, 0, True)
    assert world.sum(torch.tensor([1.5, 2.0])).tolist() == [1.5, 2.0]
    assert world.sum_on_host(torch.tensor([3, 4])) == [3, 4]
    module = torch.nn.Linear(1, 1)
    assert world.share(module) is module


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("fp16", torch.float16)])
def test_precision_by_name(precision, dtype) -> None:
    assert World().compute_dtype(precision) == dtype


def test_auto_precision_is_supported_by_the_device() -> None:
    world = World()
    dtype = world.compute_dtype("auto")
    assert dtype in (torch.bfloat16, torch.float32, torch.float16)
    product = torch.ones(2, 2, dtype=dtype, device=world.device) @ torch.ones(
        2, 2, dtype=dtype, device=world.device
    )
    assert product.sum() == 8


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="read from Linux's /proc")
def test_peak_memory_matches_the_operating_system() -> None:
    held = torch.ones(2**24)
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    (peak,) = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")]
    assert World().peak_memory_bytes() == pytest.approx(int(peak) * 1024, rel=0.02)
    assert World().peak_memory_bytes() > held.nbytes


def test_a_seed_fixes_every_generator() -> None:
    import random

    import numpy as np

    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(1))

    set_seed(5)
    first = draw()
    set_seed(5)
    assert draw() == first


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("cudaErrorMemoryAllocation at managed memory"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"
        ),
        torch.AcceleratorError("CUDA error: out of memory"),
    ],
    ids=str,
)
def test_every_form_of_out_of_memory_is_seen(error: BaseException) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: no kernel image is available for execution on the device"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        ValueError("out of memory"),
        KeyboardInterrupt(),
    ],
    ids=str,
)
def test_other_errors_are_not_out_of_memory(error: BaseException) -> None:
    assert not is_out_of_memory(error)


def test_a_device_can_be_chosen() -> None:
    assert World("cpu").device.type == "cpu"


def test_frozen_weights_are_not_sent_to_other_ranks() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    module[0].requires_grad_(False)
    assert frozen_names(module) == ["0.weight", "0.bias"]
