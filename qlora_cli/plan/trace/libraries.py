"""Keep what imported libraries hold for the life of the process out of a trace."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def load_libraries() -> None:
    """Import the libraries that a trace uses, and fill the tables that they keep.

    PEFT makes a few scalars when it is imported, and bitsandbytes its quantization tables at their
    first use. Made within a trace, they would count in the first trace of a process only.
    """
    import peft  # noqa: F401  imported for the scalars that it makes
    from bitsandbytes import functional

    weight = torch.ones(64, 64)
    for quant_type in ("nf4", "fp4"):
        packed, state = functional.quantize_4bit(
            weight, quant_type=quant_type, compress_statistics=True
        )
        functional.dequantize_4bit(packed, state)


@contextmanager
def collect_new_garbage_only() -> Iterator[None]:
    """Let garbage collection skip all objects that exist now.

    A dry run collects garbage before each step. The modules of torch and transformers are over a
    million objects, and going through them takes half a second each time.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
