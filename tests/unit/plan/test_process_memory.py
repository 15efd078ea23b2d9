"""Test the memory of a process in addition to its tensors, by its parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from qlora_cli.common.formatting import GIB, MIB
from qlora_cli.common.report import ABSENT
from qlora_cli.plan.plan import plan
from qlora_cli.plan.process_memory import (
    COMPILER,
    KEPT,
    MAPPED,
    PREPARED,
    BaseFile,
    process_on_cpu,
    process_on_cuda,
)
from qlora_cli.plan.report import TENSORS, ProcessMemory, StageMemory
from qlora_cli.plan.text import plan_text
from qlora_cli.recipe.schema import Recipe


def stages(load: int, held: int, freed: int) -> dict[str, StageMemory]:
    """A run that holds `held` bytes between steps, and `freed` more in a step."""
    kinds = {"unquantized weights": held, "saved activations": freed}
    return {
        "load": StageMemory(load, "forward", {"unquantized weights": load}, [], ABSENT),
        "step": StageMemory(held + freed, "backward", kinds, [], ABSENT),
    }


def on_cpu(found: dict[str, StageMemory], file: BaseFile, **options: Any) -> ProcessMemory:
    settings = {"kernels": "fused", "is_16_bit": False, "is_int8": False, **options}
    return process_on_cpu(found, file, **settings)


SMALL = stages(160 * MIB, 200 * MIB, 100 * MIB)
LARGE = stages(160 * MIB, 200 * MIB, 4 * GIB)
FILE = BaseFile(256 * MIB, is_kept=False)


@pytest.mark.parametrize(
    "process",
    [
        process_on_cuda(GIB),
        on_cpu(SMALL, FILE),
        on_cpu(LARGE, FILE, kernels="compiled", is_16_bit=True),
        on_cpu(SMALL, BaseFile(0, is_kept=True)),
        on_cpu(LARGE, FILE, is_int8=True),
    ],
)
def test_the_parts_add_up_to_the_range(process: ProcessMemory) -> None:
    assert process.low == sum(low for low, _ in process.parts.values())
    assert process.high == sum(high for _, high in process.parts.values())
    assert all(0 <= low <= high for low, high in process.parts.values())


def test_loading_needs_the_most_where_steps_are_small() -> None:
    process = on_cpu(SMALL, FILE)
    assert process.parts[TENSORS] == (160 * MIB, 160 * MIB)
    assert process.parts[MAPPED] == (256 * MIB, 256 * MIB)
    large = on_cpu(LARGE, FILE)
    assert large.parts[TENSORS][0] == 4 * GIB + 200 * MIB
    assert MAPPED not in large.parts
    assert large.needed == (large.low, large.high)


def test_pages_of_the_file_do_not_have_to_fit() -> None:
    """The system drops them when memory is short."""
    process = on_cpu(SMALL, FILE)
    pages = process.parts[MAPPED][1]
    step = on_cpu({"step": SMALL["step"]}, FILE)
    assert process.needed == (
        max(step.low, process.low - pages),
        max(step.high, process.high - pages),
    )
    # A 16-bit file of 16 GB that takes 5 GB in 4 bit: loading has the higher peak.
    large = on_cpu(stages(5 * GIB, 5 * GIB, 3 * GIB), BaseFile(16 * GIB, is_kept=False))
    alone = on_cpu({"step": stages(5 * GIB, 5 * GIB, 3 * GIB)["step"]}, BaseFile(0, is_kept=False))
    assert MAPPED in large.parts
    assert large.needed[0] == alone.low


def test_a_file_that_stays_mapped_is_counted_in_steps_too() -> None:
    """Unquantized weights in it are tensors, and counted once."""
    process = on_cpu(LARGE, BaseFile(256 * MIB, is_kept=True))
    assert process.parts[MAPPED] == (56 * MIB, 56 * MIB)
    assert on_cpu(LARGE, BaseFile(100 * MIB, is_kept=True)).parts[MAPPED] == (0, 0)


def test_more_freed_tensors_leave_a_wider_range() -> None:
    large = on_cpu(LARGE, FILE).parts[KEPT]
    assert large[1] > on_cpu(stages(160 * MIB, 200 * MIB, GIB), FILE).parts[KEPT][1]
    tiny = on_cpu(stages(MIB, MIB, MIB), BaseFile(MIB, is_kept=False))
    assert tiny.parts[KEPT][1] <= 2 * MIB


def test_compiled_kernels_and_16_bit_matmuls_have_their_parts() -> None:
    plain = on_cpu(LARGE, FILE)
    assert COMPILER not in plain.parts
    assert PREPARED not in plain.parts
    both = on_cpu(LARGE, FILE, kernels="compiled", is_16_bit=True)
    assert both.high == plain.high + both.parts[COMPILER][1] + both.parts[PREPARED][1]


def test_the_report_prints_the_parts(tiny_recipe: Callable[..., Recipe]) -> None:
    report = plan(tiny_recipe(), device="cpu")
    lines = plan_text(report).splitlines()
    for name in report.process.parts:
        assert (name == TENSORS) != any(line.startswith(f"  {name}  ") for line in lines)


def test_products_in_8_bit_leave_more_freed_memory() -> None:
    other, int8 = (on_cpu(LARGE, FILE, is_int8=is_int8) for is_int8 in (False, True))
    assert int8.low == other.low
    assert int8.high - other.high == round(0.7 * 4 * GIB) - round(0.4 * 4 * GIB)
