from pathlib import Path

import pytest
import torch

from qlora_cli.distributed.world import World, set_seed


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
