"""The floor: minimum time of a step at the rate of this machine's matrix products.

It counts the products of

- the frozen linear layers: forward, and the gradient of their input;
- the adapter: forward, and the gradients of its input and of both factors;
- attention: causal, forward and backward, without recomputation;
- the head at supervised positions;

and one dequantization of the weights for each use. It does not count element-wise work, the loss,
the optimizer or recomputation. It does count the gradient of the first layer's input, although no
step needs it (with 30 layers, 1/30 of about a third of the work).

    python -m benchmarks.race.floor JOB

measures the rates; the race starts it.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_LEAST_SECONDS = 0.3
_COPIES = 6
"""Number of weights used in turn, so that none is cached from its last use."""


@dataclass(frozen=True)
class Shape:
    """A matrix shape of the model, and how often it occurs."""

    name: str
    inputs: int
    outputs: int
    count: int

    @property
    def size(self) -> int:
        return self.inputs * self.outputs


@dataclass(frozen=True)
class Geometry:
    """Sizes of a Llama-like model that determine the floor."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Geometry:
        """Read the sizes from config.json."""
        heads = config["num_attention_heads"]
        return cls(
            hidden=config["hidden_size"],
            intermediate=config["intermediate_size"],
            layers=config["num_hidden_layers"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            vocabulary=config["vocab_size"],
        )

    @property
    def linears(self) -> list[Shape]:
        """List the quantized matrices, grouped by shape."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return [
            Shape("q_proj", self.hidden, queries, self.layers),
            Shape("k_proj, v_proj", self.hidden, keys, 2 * self.layers),
            Shape("o_proj", queries, self.hidden, self.layers),
            Shape("gate_proj, up_proj", self.hidden, self.intermediate, 2 * self.layers),
            Shape("down_proj", self.intermediate, self.hidden, self.layers),
        ]

    @property
    def head(self) -> Shape:
        return Shape("lm_head", self.hidden, self.vocabulary, 1)


def operations(
    geometry: Geometry, *, lengths: Sequence[int], supervised: int, r: int
) -> dict[str, float]:
    """Count the floating-point operations of one step. A multiply-add counts as two.

    Args:
        lengths: tokens of each row.
        supervised: positions at which logits are needed.
    """
    tokens = sum(lengths)
    linears = sum(shape.size * shape.count for shape in geometry.linears)
    adapter = sum(r * (s.inputs + s.outputs) * s.count for s in geometry.linears)
    width = geometry.heads * geometry.head_dim
    pairs = sum(length * length for length in lengths) / 2  # causal
    return {
        "linears": 2 * 2 * tokens * linears,
        "head": 2 * 2 * supervised * geometry.head.size,
        "adapter": 3 * 2 * tokens * adapter,
        # Two products forward; backward four.
        "attention": 6 * 2 * pairs * width * geometry.layers,
    }


def seconds_of_step(
    geometry: Geometry,
    counted: Mapping[str, float],
    rates: Mapping[str, Any],
    *,
    micro_steps: float,
) -> dict[str, float]:
    """Compute the floor of one step in seconds, by part.

    The linears and the head at the rates of their own shapes; the adapter and attention, whose
    products are too thin to reach it, at the rate of the linears; the dequantization as measured.
    """
    linears = counted["linears"] / rates["linears_per_second"]
    by_rate = {
        name: counted[name] / rates["linears_per_second"] for name in ("adapter", "attention")
    }
    head = counted["head"] / rates["head_per_second"]
    # Once in the forward and once in the backward pass of each micro-step.
    dequantize = 2 * micro_steps * rates["dequantize_seconds"]
    parts = {"linears": linears, "head": head, **by_rate, "dequantize": dequantize}
    return parts | {"all": sum(parts.values())}


def best_of(measured: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the best rates of several measurements, as a floor is a lower bound."""
    best: dict[str, Any] = dict(measured[0])
    for key in ("linears_per_second", "head_per_second"):
        best[key] = max(one[key] for one in measured)
    best["dequantize_seconds"] = min(one["dequantize_seconds"] for one in measured)
    return best


def measure(geometry: Geometry, *, tokens: int, supervised: int, threads: int) -> dict[str, Any]:
    """Measure the rates of this machine for the shapes of one micro-step, in bfloat16.

    Args:
        tokens: of a micro-step; `supervised` of them have logits.
    """
    import torch

    torch.set_num_threads(threads)
    products = {s.name: _product_seconds(s, tokens) for s in geometry.linears}
    operations_once = 2 * 2 * tokens * sum(s.size * s.count for s in geometry.linears)
    seconds_once = sum(products[s.name] * s.count for s in geometry.linears)
    head = geometry.head
    return {
        "tokens": tokens,
        "supervised": supervised,
        "threads": threads,
        "linears_per_second": operations_once / seconds_once,
        "head_per_second": 2 * 2 * supervised * head.size / _product_seconds(head, supervised),
        "dequantize_seconds": sum(_dequantize_seconds(s) * s.count for s in geometry.linears),
        "rate_by_shape": {
            s.name: 2 * 2 * tokens * s.size / products[s.name] for s in geometry.linears
        },
    }


def _product_seconds(shape: Shape, rows: int) -> float:
    """Time the forward product and the product for the input's gradient."""
    import torch

    copies = min(shape.count, _COPIES)
    weights = [
        torch.randn(shape.outputs, shape.inputs, dtype=torch.bfloat16) for _ in range(copies)
    ]
    x = torch.randn(rows, shape.inputs, dtype=torch.bfloat16)
    gradient = torch.randn(rows, shape.outputs, dtype=torch.bfloat16)
    turn = itertools.cycle(weights)

    def once() -> None:
        weight = next(turn)
        torch.mm(x, weight.t())
        torch.mm(gradient, weight)

    return _fastest(once)


def _dequantize_seconds(shape: Shape) -> float:
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight = torch.randn(shape.outputs, shape.inputs, dtype=torch.bfloat16)
    packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    return _fastest(lambda: dequantize_4bit(packed, state))


def _fastest(once: Callable[[], object]) -> float:
    """Return the seconds of the fastest call. The first may include setup and does not count."""
    once()
    seconds: list[float] = []
    while len(seconds) < 5 or sum(seconds) < _LEAST_SECONDS:
        started = time.perf_counter()
        once()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    geometry = Geometry.of(json.loads(Path(job["config"]).read_text(encoding="utf-8")))
    rates = measure(
        geometry, tokens=job["tokens"], supervised=job["supervised"], threads=job["threads"]
    )
    print(json.dumps(rates | {"geometry": asdict(geometry)}))


if __name__ == "__main__":
    main()
