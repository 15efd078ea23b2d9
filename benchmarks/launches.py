"""Count the kernels that a decoder layer launches on a card, and time its code on the host.

    python -m benchmarks.launches

No card is needed. On a CPU, forward and backward of tiny layers are counted: each operation that
launches something on CUDA (views and allocations do not). Attention is one operation in each
direction, and a compiled function is one. A layer is the difference between models of one and of
three layers. Writes launches.md.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_cli.kernels.attention import QKV, AttentionOutput, DocumentBoundaries
from qlora_cli.kernels.cross_entropy import cross_entropy
from qlora_cli.kernels.device_capabilities import DeviceCapabilities
from qlora_cli.kernels.elementwise import Elementwise
from qlora_cli.kernels.kept_factors import keep_factors
from qlora_cli.kernels.selection import Kernels
from qlora_cli.loop.fast_path import Checkpointing, CompiledKernels, ComputeOptions
from qlora_cli.loop.setup import Setup, assemble
from qlora_cli.models.loading import load_base
from qlora_cli.models.packed_attention import attend_by_document, skip_masks
from qlora_cli.plan.dry_run import FixedBatches, SingleProcess
from qlora_cli.recipe.schema import Recipe
from qlora_cli.types import Batch

SHAPE = {
    "hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4,
    "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 96,
}  # fmt: skip
"""Each weight has 256 blocks of 64 values; those of real models have a multiple of 256."""
VALUES = 64 * 256
"""Values of each of the seven weights of a layer."""
TOKENS = 4
FEW, MANY = 1, 3
"""Layers of the two models."""

_WITHOUT_KERNEL = {
    "aten::_unsafe_view", "aten::empty", "aten::empty_like", "aten::empty_strided",
    "aten::new_empty", "aten::new_empty_strided",
}  # fmt: skip
"""Operations that launch nothing, although their results are not views."""


class LaunchCounter(TorchDispatchMode):
    """Count operations that launch a kernel while the mode is entered."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch is not typed here
        self.launches: Counter[str] = Counter()
        self.dequantized = 0
        """Values of the 4-bit weights that were dequantized."""
        self.operations = 0
        """All operations, also views and allocations."""
        self._is_inside = False

    def as_one_kernel(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Call a function as one kernel."""
        self.launches["one kernel"] += 1
        outer, self._is_inside = self._is_inside, True
        try:
            return function(*args, **options)
        finally:
            self._is_inside = outer

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        name = func._schema.name
        if not self._is_inside:
            self.operations += 1
            if name not in _WITHOUT_KERNEL and not _is_view(func):
                self.launches[name] += 1
        if name == "bitsandbytes::dequantize_4bit":
            self.dequantized += made.numel()
        return made


def _is_view(func: Any) -> bool:
    """Return whether an operation returns views of its arguments and changes none."""
    schema = func._schema
    written = [a for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return not written and any(one.alias_info is not None for one in schema.returns)


@dataclass(frozen=True)
class StubAttention:
    """An attention that computes nothing, in place of the kernel for all documents of a row.

    Args:
        call: calls the stub.
    """

    call: Callable[..., Any]

    def for_heads(self, size: int, window: int | None) -> StubAttention:
        """Return this."""
        return self

    def covers(self, lengths: Any) -> bool:
        """Return that it covers all documents."""
        return True

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, documents: DocumentBoundaries, scale: float
    ) -> AttentionOutput:
        """Return zeros of the shape of the output."""
        return AttentionOutput(self.call(_zeros, q), [q])

    def backward(
        self,
        grad: Tensor,
        qkv: QKV,
        attended: AttentionOutput,
        documents: DocumentBoundaries,
        scale: float,
        ops: Elementwise,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return zeros of the shapes of queries, keys and values."""
        grad_q, grad_k, grad_v = self.call(lambda: [_zeros(x) for x in qkv])
        return grad_q, grad_k, grad_v


def _zeros(like: Tensor) -> Tensor:
    return torch.zeros(like.shape, dtype=like.dtype)


@dataclass(frozen=True)
class Variant:
    """A way to hold and to compute a layer."""

    quantization: str
    kernels: Kernels
    checkpointing: Checkpointing

    @property
    def name(self) -> str:
        """Name it in a table."""
        again = {True: "all recomputed", False: "all kept", "mlp": "feed-forward half recomputed"}
        return f"{self.quantization}, {self.kernels}, {again[self.checkpointing]}"


VARIANTS = (
    Variant("nf4", "compiled", True),
    Variant("nf4", "compiled", "mlp"),
    Variant("nf4", "compiled", False),
    Variant("nf4", "fused", True),
    Variant("nf4", "plain", True),
    Variant("none", "compiled", True),
)


@dataclass(frozen=True)
class Launches:
    """Launches of a layer, forward and backward."""

    first: Counter[str]
    """In the first micro-batch of a step, by operation."""
    further: Counter[str]
    """In each further micro-batch, which adds up gradients."""
    dequantized: float
    """Weights that are dequantized in a micro-batch, of seven."""
    operations: float
    """All operations of a further micro-batch, also views and allocations."""


def save_models(folder: Path) -> None:
    """Save the two random models."""
    from transformers import LlamaConfig, LlamaForCausalLM

    for num_layers in (FEW, MANY):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**SHAPE, num_hidden_layers=num_layers))
        model.save_pretrained(folder / str(num_layers))


def assemble_run(
    model: Path,
    variant: Variant,
    elementwise: Elementwise,
    attention: StubAttention,
    dtype: torch.dtype,
) -> Setup[Any]:
    """Assemble a run in training mode, with stubs for attention and for what is compiled."""
    recipe = Recipe.model_validate(
        {
            "model": {"path": str(model)},
            "quantization": {"type": variant.quantization},
            "adapter": {"type": "lora", "r": 8},
            "data": {"train": {"path": "rows.jsonl"}},
            "training": {"gradient_checkpointing": variant.checkpointing, "micro_batch_size": 1},
            "output": {"dir": "run"},
        }
    )
    base = load_base(recipe.model, recipe.quantization, dtype, torch.device("cpu"))
    assert attend_by_document(base)
    skip_masks(base)
    options = ComputeOptions(
        dtype,
        variant.kernels,
        DeviceCapabilities(attention),
        CompiledKernels(elementwise, cross_entropy),
    )
    adapted = recipe.adapter.attach(base)
    setup = assemble(recipe, base, adapted, options, FixedBatches([]), SingleProcess(), max_steps=1)
    setup.objective.train()
    assert setup.kernels == variant.kernels
    return setup


def make_batch() -> Batch:
    """Make a batch of one example."""
    ids = torch.ones(1, TOKENS, dtype=torch.long)
    return Batch(ids, None, ids.clone(), (TOKENS,))


def count_launches(folder: Path, variant: Variant) -> Launches:
    """Count what a layer of a variant launches."""
    first, further, dequantized, operations = [], [], [], []
    for num_layers in (FEW, MANY):
        counter = LaunchCounter()
        as_one = counter.as_one_kernel
        setup = assemble_run(
            folder / str(num_layers),
            variant,
            Elementwise.compiled(by=lambda function, as_one=as_one: partial(as_one, function)),
            StubAttention(as_one),
            torch.bfloat16,
        )
        with keep_factors():
            for found in (first, further):
                counter.launches.clear()
                counter.dequantized = counter.operations = 0
                with counter:
                    setup.objective(make_batch())[0].backward()
                found.append(Counter(counter.launches))
        dequantized.append(counter.dequantized)
        operations.append(counter.operations)
    return Launches(
        *(_per_layer(*pair) for pair in (first, further)),
        (dequantized[1] - dequantized[0]) / (VALUES * (MANY - FEW)),
        (operations[1] - operations[0]) / (MANY - FEW),
    )


def _per_layer(few: Counter[str], many: Counter[str]) -> Counter[str]:
    """Return what one layer adds."""
    return Counter({name: (many[name] - few[name]) // (MANY - FEW) for name in many})


def _allocating() -> Elementwise:
    """Return element-wise functions that only allocate their results."""

    def factor(x: Tensor) -> Tensor:
        return x.new_empty(len(x), 1)

    def half(gate_up: Tensor) -> Tensor:
        return gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)

    like = torch.empty_like
    return Elementwise(
        is_compiled=True,
        rms_norm=lambda x, *_: (like(x), factor(x)),
        add_rms_norm=lambda x, *_: (like(x), like(x), factor(x)),
        apply_rms_norm=lambda x, *_: like(x),
        rms_norm_backward=lambda grad, *_: like(grad),
        rotate=lambda x, *_: like(x),
        swiglu=half,
        swiglu_backward=lambda grad, gate_up: (like(gate_up), like(grad)),
    )


@contextmanager
def _allocating_dequantization() -> Iterator[None]:
    """Let bitsandbytes' operations on a CPU only allocate their results."""
    library = torch.library.Library("bitsandbytes", "IMPL")

    def four_bit(
        packed: Tensor, absmax: Tensor, size: int, kind: str, shape: Any, dtype: Any
    ) -> Any:
        return torch.empty(shape, dtype=dtype)

    def statistics(packed: Tensor, absmax: Tensor, code: Tensor, size: int, dtype: Any) -> Any:
        return torch.empty_like(packed, dtype=dtype)

    library.impl("dequantize_4bit", four_bit, "CPU", allow_override=True)
    library.impl("dequantize_blockwise", statistics, "CPU", allow_override=True)
    try:
        yield
    finally:
        library._destroy()


def host_microseconds(folder: Path, variant: Variant, repeats: int = 200) -> float:
    """Time Python and dispatch of a layer, forward and backward, in a further micro-batch.

    Compiled functions, attention and dequantization only allocate. Matmuls and other operations
    are those of a CPU, on a few values in float32.
    """
    attention = StubAttention(lambda function, *args: function(*args))
    few, many = (
        assemble_run(folder / str(n), variant, _allocating(), attention, torch.float32)
        for n in (FEW, MANY)
    )
    batch = make_batch()
    with keep_factors(), _allocating_dequantization():
        pairs = [(_seconds(few, batch), _seconds(many, batch)) for _ in range(repeats)]
    less, more = (min(seconds) for seconds in zip(*pairs, strict=True))
    return 1e6 * (more - less) / (MANY - FEW)


def _seconds(setup: Setup[Any], batch: Batch) -> float:
    """Time a micro-batch, without the time of other processes."""
    started = time.thread_time()
    setup.objective(batch)[0].backward()
    return time.thread_time() - started


def page(rows: list[tuple[Variant, Launches, float]]) -> str:
    """Write the table as a page."""
    lines = [
        "<!-- Written by benchmarks/launches.py; run that instead of editing. -->",
        "# Launches of a decoder layer",
        "",
        "Operations that launch a kernel on a card, per layer and micro-batch, forward and",
        "backward, with LoRA on all seven linear layers. They are counted on a CPU: attention is",
        "one operation in each direction (its backward pass is several kernels), and so is a",
        "compiled function. The first micro-batch of a step makes the factors of LoRA in the",
        "compute dtype; each further one adds its gradients to those that are there. A weight is",
        "dequantized by three launches, or several weights by three together.",
        "",
        "The time is that of Python and dispatch in one thread of a slow, shared CPU (an attribute",
        "of a tensor takes 0.2 microseconds), in a further micro-batch, the best of 200: what is",
        "compiled, attention and dequantization only allocate their results. It varies by a third.",
        "Operations include views and allocations.",
        "",
        "| base, kernels, memory mode | first micro-batch | further | of these dequantize "
        "| weights dequantized | matmuls | operations | host, microseconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for variant, found, microseconds in rows:
        further = found.further
        dequantize = sum(further[f"bitsandbytes::{name}"] for name in _DEQUANTIZE)
        dequantize += further["bitsandbytes::dequantize_blockwise"]  # the offset is added to each
        matmuls = sum(further[f"aten::{name}"] for name in ("mm", "addmm", "addmm_"))
        cells = [
            variant.name, f"{found.first.total()}", f"{further.total()}", f"{dequantize}",
            f"{found.dequantized:.0f}", f"{matmuls}", f"{found.operations:.0f}",
            f"{microseconds:,.0f}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


_DEQUANTIZE = ("dequantize_4bit", "dequantize_blockwise")


def main() -> None:
    """Count and time all variants."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_models(folder)
        for variant in VARIANTS:
            found = count_launches(folder, variant)
            rows.append((variant, found, host_microseconds(folder, variant)))
            print(variant.name, found, rows[-1][-1], flush=True)
    Path(__file__).with_suffix(".md").write_text(page(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
