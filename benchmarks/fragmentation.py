"""Replay the allocations of a run through a model of PyTorch's caching allocator on CUDA.

    python -m benchmarks.fragmentation ROWS.jsonl [ROWS.jsonl ...]

The allocations are those of traced steps, each of which is a micro-batch of other lengths: rows of
the files, four characters a token. The allocator's model is in caching_allocator.py. A run uses
expandable segments. No GPU is needed, and none has verified this. Writes fragmentation.md.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.caching_allocator import MIB, Event, replay
from qlora_cli.plan.process_memory import UNUSABLE, process_on_cuda
from qlora_cli.plan.trace.memory_counter import MemoryCounter

PAGE = Path(__file__).with_suffix(".md")
CONFIG = "configs/llama-3.1-8b-qlora-24gb.yaml"
MICRO_BATCHES, ROWS, MAX_LENGTH = 12, 4, 2048


class RecordingCounter(MemoryCounter):
    """A memory counter that records each allocation and each release."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
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


def batches(lengths: Sequence[int]) -> Iterator[Any]:
    """Yield micro-batches of random rows, half of each supervised."""
    from qlora_cli.data.batching.collate import concatenate_batch
    from qlora_cli.types import Example

    generator = random.Random(0)
    for _ in range(MICRO_BATCHES):
        chosen = generator.sample(list(lengths), ROWS)
        rows = [
            Example([1] * size, [-100] * (size // 2) + [1] * (size - size // 2)) for size in chosen
        ]
        yield concatenate_batch(rows, 0)


def traced(lengths: Sequence[int], mode: dict[str, Any]) -> tuple[list[Event], list[int]]:
    """Trace a run of micro-batches; return its events and the tokens of each micro-batch."""
    from qlora_cli.kernels.attention import VarlenAttention
    from qlora_cli.kernels.device_capabilities import DeviceCapabilities
    from qlora_cli.loop.fast_path import ComputeOptions
    from qlora_cli.plan.dry_run import dry_run
    from qlora_cli.plan.trace.libraries import load_libraries
    from qlora_cli.plan.trace.memory_counter import LOAD, CountedHostMemory
    from qlora_cli.plan.trace.meta_model import load_traced
    from qlora_cli.plan.traced_memory import GRANULARITY
    from qlora_cli.recipe.load import load_recipe

    load_libraries()
    settings = [f"{key}={value}" for key, value in mode.items()]
    recipe = load_recipe(Path(CONFIG), settings).recipe
    config, _ = recipe.model.read_config()
    size, dtype = GRANULARITY["cuda"], torch.bfloat16
    count = RecordingCounter(device="cuda", granularity=size, vocabulary_size=config.vocab_size)
    device = DeviceCapabilities(VarlenAttention(), CountedHostMemory(count))
    steps = [[batch] for batch in batches(lengths)]
    with count:
        with count.stage(LOAD):
            base = load_traced(config, recipe.quantization.load_options(dtype), count)
        options = ComputeOptions(dtype, mode["training.kernels"], device)
        dry_run(base, recipe, count, options, steps=steps, held_out=None)
    return count.events, [step[0].input_ids.numel() for step in steps]


MODES = {
    "recomputed": {"training.kernels": "fused", "training.gradient_checkpointing": "true"},
    "feed-forward half recomputed": {
        "training.kernels": "fused", "training.gradient_checkpointing": "mlp",
    },
    "recomputed, transformers' layers": {
        "training.kernels": "plain", "training.gradient_checkpointing": "true",
    },
}  # fmt: skip

HEAD = """\
<!-- Written by `python -m benchmarks.fragmentation`; run that instead of editing. -->
# Fragmentation on a card, simulated

Traced steps of `{config}`, {number} micro-batches of {rows} rows ({tokens} tokens),
replayed through a model of PyTorch's caching allocator with memory to spare, which was not compared
with a card. A plan allows {share} of the tensors for memory that the allocator cannot use.

| mode | segments | tensors, MiB | reserved, MiB | more |
|---|---|---|---|---|
"""


def main() -> None:
    """Trace and replay all modes, and write the page."""
    lengths = lengths_of([Path(name) for name in sys.argv[1:]])
    lines, tokens = [], [0]
    for name, mode in MODES.items():
        events, tokens = traced(lengths, mode)
        for is_expandable in (True, False):
            most, reserved = replay(events, is_expandable=is_expandable)
            lines.append(
                f"| {name} | {'expandable' if is_expandable else 'fixed'} | {most / MIB:,.0f} | "
                f"{reserved / MIB:,.0f} | {100 * (reserved / most - 1):.1f} % |"
            )
            print(lines[-1], flush=True)
    low, high = (process_on_cuda(10**9).parts[UNUSABLE][end] / 10**9 for end in (0, 1))
    head = HEAD.format(
        config=CONFIG,
        number=MICRO_BATCHES,
        rows=ROWS,
        tokens=f"{min(tokens):,} to {max(tokens):,}",
        share=f"{100 * low:.0f} to {100 * high:.0f} %",
    )
    PAGE.write_text(head + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
