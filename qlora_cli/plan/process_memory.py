"""Estimate the memory of a whole process: its tensors, and what a trace cannot see.

The constants for a CPU were measured on runs of `qlora train` with SmolLM2-135M (Linux, glibc 2.36,
torch 2.13, float32): the resident set and the figures of malloc, sampled every 5 ms.
benchmarks/plan_process.md compares the range with the peaks of such runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from qlora_cli.common.formatting import MIB
from qlora_cli.kernels.selection import Kernels
from qlora_cli.plan.report import TENSORS, ProcessMemory, StageMemory
from qlora_cli.plan.trace.memory_counter import HELD, LOAD, UNQUANTIZED

LIBRARIES = "Python and libraries"
COMPILER = "compiler"
PREPARED = "prepared matmuls"
KEPT = "freed memory that malloc keeps"
MAPPED = "pages of the base's file"
CONTEXT = "CUDA context and workspaces"
UNUSABLE = "memory that the allocator cannot use"

Ends = tuple[int, int]
"""Lower and upper end, in bytes."""

_LIBRARIES = (450 * MIB, 540 * MIB)
"""Python, torch, transformers, peft, bitsandbytes and the tokenizer. 469 MiB were measured in a
step: 165 in malloc, 183 of other anonymous memory, and 121 of files."""

_COMPILER = (80 * MIB, 180 * MIB)
"""The compiler of torch, and the compiled functions. 145 MiB were measured."""

_PREPARED = (0, 150 * MIB)
"""oneDNN and torch each keep 128 prepared 16-bit matmuls of 0.58 MiB
(`_compat.bound_product_caches`)."""

_KEPT_OF_LOADING = 300 * MIB
"""Loading frees the tensors of the file after converting them. Those of up to 32 MiB come from the
heap of malloc, which returns only its end to the system. 35 to 300 MiB were left, another amount in
each run."""

_KEPT_OF_QUANTIZING = (100 * MIB, 500 * MIB)
"""The same where what is converted is quantized, and then freed too. 236 to 540 MiB above the other
parts were measured in five runs of one recipe, the most while other programs used the processor."""

_KEPT_OF_STEPS = 0.4
"""Share of the tensors that a step frees: activations, logits, gradients. Micro-batches differ in
length, so freed blocks do not fit the next tensors. With what loading left, 0.36 to 0.45 of large
steps were measured, and 420 MiB in a run of 90 steps that freed 480 each."""

_KEPT_OF_INT8_STEPS = 0.7
"""The same for a base in 8 bit, whose products also make and free 16-bit copies, integers and masks
between tensors that stay. 0.62 was measured, in one run."""


@dataclass(frozen=True)
class BaseFile:
    """The file of the base, which is mapped into memory while it is read."""

    size: int
    """Bytes of its weights."""
    is_kept: bool
    """Its dtype is that of the unquantized weights. They stay in the file, and all of it stays
    mapped."""
    is_quantized: bool = False
    """Its weights are quantized when they are loaded."""

    @property
    def kept(self) -> Ends:
        """Bytes of the tensors freed in loading that malloc keeps."""
        if not self.is_quantized:
            return 0, min(self.size, _KEPT_OF_LOADING)
        least, most = _KEPT_OF_QUANTIZING
        return min(self.size // 2, least), min(2 * self.size, most)


def process_on_cuda(tensors: int) -> ProcessMemory:
    """Estimate the memory of a process on a card.

    The context took 141 MiB on a T4, and takes more on newer cards; cuBLAS has workspaces. What the
    allocator cannot use was 6 % and up on a T4, by fitcheck-llm 0.2.
    """
    return _process(
        {
            TENSORS: (tensors, tensors),
            CONTEXT: (200 * MIB, 800 * MIB),
            UNUSABLE: (round(0.02 * tensors), round(0.12 * tensors)),
        }
    )


def process_on_cpu(
    stages: Mapping[str, StageMemory],
    file: BaseFile,
    kernels: Kernels,
    *,
    is_16_bit: bool,
    is_int8: bool,
) -> ProcessMemory:
    """Estimate the resident set of a process on a CPU, at the stage that needs the most.

    Args:
        stages: stage -> its peak.
        is_16_bit: matmuls are in 16 bits.
        is_int8: the base is held in 8 bit.
    """
    share = _KEPT_OF_INT8_STEPS if is_int8 else _KEPT_OF_STEPS
    least, loading = file.kept
    steps = max(memory.bytes - _held(memory) for memory in stages.values())
    found = []
    for stage, memory in stages.items():
        is_loading = stage == LOAD
        parts: dict[str, Ends] = {
            TENSORS: (memory.bytes, memory.bytes),
            LIBRARIES: _LIBRARIES,
            KEPT: (least, loading if is_loading else loading + round(share * steps)),
        }
        if is_loading or file.is_kept:
            # The tensors that stay in the file are counted already.
            pages = max(0, file.size - file.is_kept * memory.kinds.get(UNQUANTIZED, 0))
            parts[MAPPED] = (pages, pages)
        if kernels == "compiled" and not is_loading:
            parts[COMPILER] = _COMPILER
        if is_16_bit and not is_loading:
            parts[PREPARED] = _PREPARED
        found.append(_process(parts))
    largest = max(found, key=lambda process: process.high)
    # Without those pages another stage may need the most.
    low, high = (max(one.needed[end] for one in found) for end in (0, 1))
    return replace(largest, needed=(low, high))


def _held(memory: StageMemory) -> int:
    """Return the bytes that exist between steps too."""
    return sum(memory.kinds.get(kind, 0) for kind in HELD)


def _process(parts: Mapping[str, Ends]) -> ProcessMemory:
    low, high = (sum(ends[i] for ends in parts.values()) for i in (0, 1))
    pages = parts.get(MAPPED, (0, 0))
    return ProcessMemory(low, high, needed=(low - pages[0], high - pages[1]), parts=dict(parts))
