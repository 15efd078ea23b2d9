"""Replay the allocations of a run through a model of PyTorch's caching allocator on CUDA.

    python -m benchmarks.fragmentation ROWS.jsonl [ROWS.jsonl ...]

The allocations are those of traced steps, whose micro-batches differ in length: rows of the files,
four characters a token. The allocator's model is in caching_allocator.py. A run uses expandable
segments. No GPU is needed, and none has verified this. Writes fragmentation.md.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.caching_allocator import MIB, Event, replay
from qlora_cli.kernels.attention import VarlenAttention
from qlora_cli.kernels.device_capabilities import DeviceCapabilities
from qlora_cli.kernels.selection import Kernels
from qlora_cli.loop.fast_path import ComputeOptions
from qlora_cli.plan.dry_run import dry_run
from qlora_cli.plan.process_memory import UNUSABLE, process_on_cuda
from qlora_cli.plan.trace.libraries import collect_new_garbage_only, load_libraries
from qlora_cli.plan.trace.memory_counter import (
    LOAD,
    QUANTIZED,
    UNQUANTIZED,
    CountedHostMemory,
    MemoryCounter,
)
from qlora_cli.plan.trace.meta_model import load_traced
from qlora_cli.plan.traced_memory import GRANULARITY
from qlora_cli.recipe.load import load_recipe
from qlora_cli.types import Batch

PAGE = Path(__file__).with_suffix(".md")
CONFIG = "configs/llama-3.1-8b-qlora-24gb.yaml"
LAYERS, STEPS, MICRO_BATCHES, MAX_LENGTH = 32, 15, 2, 2048
RUNS: tuple[tuple[int, Kernels], ...] = (
    (4, "compiled"),
    (4, "fused"),
    (4, "plain"),
    (32, "compiled"),
)
"""Rows of a micro-batch, and kernels. A trace takes one to four minutes, more on a busy machine."""


class RecordingCounter(MemoryCounter):
    """A memory counter that records each allocation and each release."""

    def __init__(self, vocabulary_size: int) -> None:
        super().__init__("cuda", GRANULARITY["cuda"], vocabulary_size)
        self.events: list[Event] = []
        self._numbers: dict[int, int] = {}

    def _add(self, tensor: torch.Tensor, kind: str, *, is_known: bool = False) -> None:
        known = len(self._held)
        super()._add(tensor, kind, is_known=is_known)
        if len(self._held) == known:
            return
        key, held = next(reversed(self._held.items()))
        if held.size and held.kind != "host":
            self._numbers[key] = len(self.events)
            self.events.append((len(self.events), held.size))

    def _drop(self, key: int, _: object) -> None:
        super()._drop(key, _)
        number = self._numbers.pop(key, None)
        if number is not None:
            self.events.append((number, 0))


def lengths_of(paths: Sequence[Path]) -> list[int]:
    """Return the tokens of the rows of files, about four characters each."""
    rows = [line for path in paths for line in path.read_text(encoding="utf-8").splitlines()]
    return [min(MAX_LENGTH, max(8, len(row) // 4)) for row in rows]


def micro_batches(lengths: Sequence[int], rows: int) -> Iterator[Batch]:
    """Yield micro-batches of random rows, half of each supervised."""
    from qlora_cli.data.batching.collate import concatenate_batch
    from qlora_cli.types import Example

    generator = random.Random(0)
    for _ in range(STEPS * MICRO_BATCHES):
        chosen = generator.sample(list(lengths), rows)
        yield concatenate_batch(
            [Example([1] * n, [-100] * (n // 2) + [1] * (n - n // 2)) for n in chosen], 0
        )


def traced(batches: Sequence[Batch], kernels: Kernels) -> list[Event]:
    """Trace loading and a run of micro-batches, and return its allocations."""
    # The states of a paged optimizer are not in the allocator's memory.
    settings = [f"training.kernels={kernels}", "optimizer.type=adamw"]
    recipe = load_recipe(Path(CONFIG), settings).recipe
    config: Any = recipe.model.read_config()[0]
    config.num_hidden_layers = LAYERS
    count = RecordingCounter(config.vocab_size)
    device = DeviceCapabilities(VarlenAttention(), CountedHostMemory(count))
    steps = [batches[i : i + MICRO_BATCHES] for i in range(0, len(batches), MICRO_BATCHES)]
    with collect_new_garbage_only(), count:
        with count.stage(LOAD):
            base = load_traced(config, recipe.quantization.load_options(torch.bfloat16), count)
        weights = count.by_kind[QUANTIZED] + count.by_kind[UNQUANTIZED]
        options = ComputeOptions(torch.bfloat16, kernels, device)
        dry_run(base, recipe, count, options, steps=steps, held_out=None)
    # transformers takes the size of the model as one block first, and frees it
    # (`caching_allocator_warmup`).
    return [(-1, weights), (-1, 0), *count.events]


HEAD = """\
<!-- Written by `python -m benchmarks.fragmentation`; run that instead of editing. -->
# Fragmentation on a card, simulated

**Not verified on a card.** Memory that PyTorch's caching allocator reserves for a run of
`{config}` ({layers} layers, 4 bit, AdamW): loading, then {steps} steps of {micro_batches}
micro-batches without padding. They are random rows of {files},
{shortest} to {longest} tokens each (four characters count as one; half of them are supervised).

The allocations are those of traced steps: attention, dequantizing and a compiled function only
allocate their results. They are replayed through a model of the allocator's rules
(`benchmarks/caching_allocator.py`), on a card with memory to spare: where it is short, the
allocator gives free segments back first. `qlora` sets expandable segments; "fixed" is PyTorch's
default. "More" is what is reserved beyond the peak of the tensors; a plan
allows {low:.0f} to {high:.0f} % of them.

| rows | tokens | kernels | segments | tensors, MiB | reserved, MiB | more, MiB | more |
|---|---|---|---|---|---|---|---|
"""


def head(paths: Sequence[Path], lengths: Sequence[int]) -> str:
    """Return the page's text above its rows."""
    low, high = (process_on_cuda(10**9).parts[UNUSABLE][end] / 10**7 for end in (0, 1))
    return HEAD.format(
        config=CONFIG,
        layers=LAYERS,
        steps=STEPS,
        micro_batches=MICRO_BATCHES,
        files=" and ".join(f"{path.parent.name}/{path.name}" for path in paths),
        shortest=min(lengths),
        longest=max(lengths),
        low=low,
        high=high,
    )


def main() -> None:
    """Trace and replay all modes, and write the page."""
    paths = [Path(name) for name in sys.argv[1:]]
    lengths = lengths_of(paths)
    load_libraries()
    lines = []
    for rows, kernels in RUNS:
        batches = list(micro_batches(lengths, rows))
        tokens = [batch.input_ids.numel() for batch in batches]
        events = traced(batches, kernels)
        for is_expandable in (True, False):
            most, reserved = replay(events, is_expandable=is_expandable)
            lines.append(
                f"| {rows} | {min(tokens):,} to {max(tokens):,} | {kernels} | "
                f"{'expandable' if is_expandable else 'fixed'} | {most / MIB:,.0f} | "
                f"{reserved / MIB:,.0f} | {(reserved - most) / MIB:,.0f} | "
                f"{100 * (reserved / most - 1):.1f} % |"
            )
            print(lines[-1], flush=True)
    PAGE.write_text(head(paths, lengths) + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
