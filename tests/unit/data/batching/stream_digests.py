"""Digests of whole streams of batches: the order and content of every row, in many settings.

`KNOWN` was computed at commit de772fc, before rows could be linked, by running this file there.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from typing import Any

MAX_LENGTH = 32
SOURCES: dict[str, list[tuple[int, float]] | None] = {
    "one source": None,
    "three sources": [(30, 1.0), (12, 2.5), (18, 0.4)],
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "padded": {},
    "padding-free": {"padding": False},
    "packed": {"max_length": MAX_LENGTH},
}
RANKS = [(0, 1), (0, 2), (1, 2), (2, 3)]


def settings() -> dict[str, dict[str, Any]]:
    """The arguments of a stream for each name in `KNOWN`."""
    found = {}
    for (name, parts), (layout, how), (rank, size) in itertools.product(
        SOURCES.items(), LAYOUTS.items(), RANKS
    ):
        key = f"{name}, {layout}, rank {rank} of {size}"
        found[key] = {"parts": parts, "rank": rank, "world_size": size, **how}
    return found


def digest_of(example_class: Any, stream_class: Any, arguments: dict[str, Any]) -> str:
    """A short sha256 of all that a stream of 60 examples gives in 2.5 epochs."""
    generator = random.Random(7)
    examples = []
    for number in range(1, 61):
        ids = [number] * generator.randint(2, MAX_LENGTH)
        start = generator.randrange(len(ids))
        examples.append(example_class(ids, [-100] * start + ids[start:]))
    stream = stream_class(
        examples,
        batch_size=7,
        micro_batch_size=3,
        seed=5,
        epochs=2.5,
        pad_token_id=0,
        **arguments,
    )
    found: list[Any] = [stream.num_steps, stream.summary(), stream.tokens(9)]
    steps = [stream.micro_batches(step) for step in range(stream.num_steps + 2)]
    for step, batches in enumerate([*steps, *stream.largest(5)]):
        found.append(stream.rows(step))
        for batch in batches:
            mask = None if batch.attention_mask is None else batch.attention_mask.tolist()
            tokens = batch.input_ids.tolist(), batch.labels.tolist(), mask
            found.append([*tokens, batch.documents, batch.examples])
    return hashlib.sha256(repr(found).encode()).hexdigest()[:16]


KNOWN = {
    "one source, padded, rank 0 of 1": "f7d4ff6330062d15",
    "one source, padded, rank 0 of 2": "a9ef1ce5199ff4ab",
    "one source, padded, rank 1 of 2": "21bf4debdf646feb",
    "one source, padded, rank 2 of 3": "19ca747964d5bdeb",
    "one source, padding-free, rank 0 of 1": "e86981ea68ff3850",
    "one source, padding-free, rank 0 of 2": "f1d5ae877c138264",
    "one source, padding-free, rank 1 of 2": "8ac5151b164d1a83",
    "one source, padding-free, rank 2 of 3": "89d632a25d783105",
    "one source, packed, rank 0 of 1": "894ba9653f5f437b",
    "one source, packed, rank 0 of 2": "2384e00bf2591b25",
    "one source, packed, rank 1 of 2": "bc896027a6ff11dd",
    "one source, packed, rank 2 of 3": "f45b7304cc9ecb10",
    "three sources, padded, rank 0 of 1": "602a6bfe3817b87c",
    "three sources, padded, rank 0 of 2": "ba70f3f365076127",
    "three sources, padded, rank 1 of 2": "23c81323058513a6",
    "three sources, padded, rank 2 of 3": "1b3e2191f38147ce",
    "three sources, padding-free, rank 0 of 1": "e75f5f2202ea1a12",
    "three sources, padding-free, rank 0 of 2": "52b6dfe8b8b872f5",
    "three sources, padding-free, rank 1 of 2": "35539cd779d4108e",
    "three sources, padding-free, rank 2 of 3": "a3997e896707a760",
    "three sources, packed, rank 0 of 1": "1601ba49bbb24c38",
    "three sources, packed, rank 0 of 2": "d50fdf5cbd78e478",
    "three sources, packed, rank 1 of 2": "3efd3ca113672faa",
    "three sources, packed, rank 2 of 3": "b899f4aac0e43615",
}
