"""Count the bytes of all live tensors, real or traced, by kind."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qlora_cli.distributed.devices import Device
from qlora_cli.plan.trace.kernel_shapes import decompose
from qlora_cli.plan.trace.traced_tensor import TracedTensor, inside_kernel

QUANTIZED = "quantized weights"
CONSTANTS = "quantization constants"
UNQUANTIZED = "unquantized weights"
ADAPTER = "trained weights"
REFERENCE = "reference weights"
GRADIENTS = "gradients"
STATES = "optimizer states"
BUCKETS = "gradients to be exchanged"
SAVED = "saved activations"
RECOMPUTED = "recomputed activations"
LOGITS = "logits and loss"
BATCH = "batch"
WORKSPACE = "workspace"
_HOST = "host"
"""Tensors in host memory, which are counted separately."""

HELD = (QUANTIZED, CONSTANTS, UNQUANTIZED, ADAPTER, REFERENCE, STATES, BUCKETS)
"""Kinds that exist between steps."""

LOAD = "load"

KINDS = (
    QUANTIZED, CONSTANTS, UNQUANTIZED, ADAPTER, REFERENCE, STATES, BUCKETS, GRADIENTS, SAVED,
    RECOMPUTED, LOGITS, BATCH, WORKSPACE,
)  # fmt: skip


class Segment(NamedTuple):
    """A part of a trace: a layer in the forward pass of a stage, for example."""

    stage: str
    """load, first step, ..."""
    part: str
    """forward, backward or update; or between, when gradients exist and no pass is running."""
    turn: int
    """Number of forward passes that have begun in the stage."""
    place: int | None
    """Position in the model: 0 before the first layer, 2i + 1 in layer i, 2i + 2 after it. None is
    after all layers in the backward pass."""


@dataclass(slots=True)
class Peak:
    """The largest amount of live memory in a segment."""

    total: int = 0
    """Bytes."""
    kinds: dict[str, int] = field(default_factory=dict)
    """The same by kind."""


class _Held(NamedTuple):
    size: int
    kind: str
    reference: weakref.ref[Any]


class MemoryCounter(TorchDispatchMode):
    """Count the memory of tensors while the mode is entered.

    A storage counts from the operation that creates it, or from `hold`, until it is freed.

    Args:
        device: the device whose kernels are traced, including what they allocate inside.
        granularity: allocation unit in bytes; sizes are rounded up to a multiple.
        vocabulary_size: tensors with this many columns are logits.
    """

    def __init__(
        self, device: Device = "cpu", granularity: int = 1, vocabulary_size: int = 0
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch is not typed here
        self.peaks: dict[Segment, Peak] = {}
        self.flops: Counter[str] = Counter()
        self.products: set[Any] = set()
        """Distinct matmuls by shape and layout: a library prepares each once."""
        self.by_kind: Counter[str] = Counter()
        self.total = 0
        self.host_bytes = 0
        """Peak of host memory (`on_host`)."""
        self._turn = 0
        self._place = 0
        self._place_back: int | None = None
        self.device = device
        self._granularity = granularity
        self._vocabulary_size = vocabulary_size
        self._held: dict[int, _Held] = {}
        self._stage = ""
        self._is_updating = False
        self._is_on_host = False
        self._on_host = 0
        self._is_inside = False
        self._unsaved: list[int] = []
        """Storages that the running layer made where autograd does not record."""

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Attribute what happens in this context to a stage."""
        outer, self._stage = self._stage, name
        self._turn, self._place, self._place_back = 0, 0, None
        try:
            yield
        finally:
            self._stage = outer

    def step_hooks(self, model: nn.Module, layers: Sequence[nn.Module]) -> list[Any]:
        """Register hooks that track which layer is running. Returns their handles.

        Args:
            model: a module that is called once per forward pass.
            layers: the layers of the model, in the order of their calls.
        """
        handles = [model.register_forward_pre_hook(lambda *_: self._begin())]
        for i, layer in enumerate(layers):
            handles.append(layer.register_forward_pre_hook(lambda *_, i=i: self._go(2 * i + 1)))
            handles.append(layer.register_forward_hook(lambda _, __, out, i=i: self._leave(i, out)))
        return handles

    def hold(self, tensors: Iterable[Tensor | None], kind: str) -> None:
        """Count existing tensors, or assign them a kind."""
        for tensor in tensors:
            if tensor is not None:
                self._add(tensor, kind, is_known=True)
        self._note()

    @contextmanager
    def on_host(self) -> Iterator[None]:
        """Count tensors created in this context as host memory."""
        self._is_on_host = True
        try:
            yield
        finally:
            self._is_on_host = False

    def as_one_kernel(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call a function as one kernel: only its results take memory."""
        self._is_inside = True
        try:
            made = function(*args)
        finally:
            self._is_inside = False
        kind = self._kind("")
        for tensor in tree_leaves(made):
            self._add(tensor, kind)
        self._note()
        return made

    def updating(self, value: bool) -> None:
        """Set whether the optimizer is running."""
        self._is_updating = value

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs, name = kwargs or {}, func._schema.name
        if work := _WORK.get(name):
            self.flops[self._stage] += work(*args)
            self.products.add((name, *map(_layout, args)))
        kernel = _decompose(name, self.device)
        if kernel is not None:
            with self, inside_kernel():
                return kernel(*args, **kwargs)
        made = func(*args, **kwargs)
        tensors = [made] if isinstance(made, Tensor) else tree_leaves(made)
        kind = None
        if self._is_inside:
            return made
        for tensor in tensors:
            if isinstance(tensor, Tensor):
                kind = kind or self._kind(name)
                self._add(tensor, kind)
        self._note()
        return made

    def _begin(self) -> None:
        self._turn += 1
        self._place, self._place_back = 0, None

    def _go(self, place: int) -> None:
        if torch._C._current_graph_task_id() == -1:  # not when a layer is recomputed
            self._place = place
            self._unsaved.clear()

    def _leave(self, layer: int, made: Any) -> None:
        if torch.is_grad_enabled() and torch._C._current_graph_task_id() == -1:
            self._keep_for_backward()
        self._go(2 * layer + 2)
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(lambda _: self._go_back(2 * layer + 1))

    def _keep_for_backward(self) -> None:
        """Count what a layer leaves behind as saved: inputs of layers, and what the backward pass
        of a fused layer reads. Autograd records neither inside a function of its own."""
        for key in self._unsaved:
            held = self._held.get(key)
            if held is not None and held.kind == WORKSPACE:
                self._held[key] = held._replace(kind=SAVED)
                self._change(WORKSPACE, -held.size)
                self._change(SAVED, held.size)

    def _go_back(self, place: int) -> None:
        self._place_back = place

    def _kind(self, name: str) -> str:
        if self._is_on_host:
            return _HOST
        if self._is_updating:
            return STATES if "zeros" in name else WORKSPACE
        if torch._C._current_graph_task_id() == -1:
            return SAVED if torch.is_grad_enabled() else WORKSPACE
        return RECOMPUTED if torch.is_grad_enabled() else WORKSPACE

    def _add(self, tensor: Tensor, kind: str, *, is_known: bool = False) -> None:
        held = tensor.meta if isinstance(tensor, TracedTensor) else tensor
        if held is tensor and tensor.device.type == "meta":
            return  # part of a meta model, which does not stand for a real tensor
        storage = held.untyped_storage()
        key = storage._cdata
        known = self._held.get(key)
        if known is None:
            size = -(-storage.nbytes() // self._granularity) * self._granularity
            if kind == _HOST:
                size = _pinned_size(storage.nbytes())
            elif (
                not is_known
                and self._vocabulary_size
                and tensor.shape[-1:] == (self._vocabulary_size,)
            ):
                kind = LOGITS
            reference = weakref.ref(storage, partial(self._drop, key))
            self._held[key] = _Held(size, kind, reference)
            self._change(kind, size)
            if kind == WORKSPACE:
                self._unsaved.append(key)
        elif is_known and known.kind != kind:
            self.by_kind[known.kind] -= known.size
            self.by_kind[kind] += known.size
            self._held[key] = known._replace(kind=kind)

    def _drop(self, key: int, _: object) -> None:
        held = self._held.pop(key)
        self._change(held.kind, -held.size)

    def _change(self, kind: str, size: int) -> None:
        if kind == _HOST:
            self._on_host += size
            self.host_bytes = max(self.host_bytes, self._on_host)
        else:
            self.total += size
            self.by_kind[kind] += size

    def _note(self) -> None:
        segment = Segment(self._stage, *self._whereabouts())
        peak = self.peaks.get(segment)
        if peak is None:
            peak = self.peaks[segment] = Peak()
        if self.total > peak.total:
            peak.total, peak.kinds = self.total, dict(self.by_kind)

    def _whereabouts(self) -> tuple[str, int, int | None]:
        if self._is_updating:
            return "update", self._turn, None
        if torch._C._current_graph_task_id() != -1:
            return "backward", self._turn, self._place_back
        if self._place_back is not None:
            return "between", self._turn, None
        return "forward", self._turn, self._place


class CountedHostMemory:
    """Host memory of a traced device, counted separately."""

    def __init__(self, count: MemoryCounter) -> None:
        self._count = count

    def put(self, tensor: Tensor) -> Tensor:
        """Copy a tensor to the host."""
        with self._count.on_host():
            return tensor.clone()

    def get(self, kept: Tensor, device: torch.device) -> Tensor:
        """Copy it back to the device."""
        return kept.clone()


def _pinned_size(size: int) -> int:
    """Round up to a power of two, as torch does for pinned memory."""
    return 1 << (size - 1).bit_length() if size else 0


def _layout(value: Any) -> Any:
    """Return what a library prepares a matmul for: dtype, shape and strides."""
    if isinstance(value, Tensor):
        return value.dtype, value.shape, value.stride()
    return None


def _product(one: Tensor, other: Tensor, *_: Any) -> int:
    """Count multiplications and additions of (..., n, k) by (..., k, m)."""
    return 2 * one.numel() * other.shape[-1]


def _grouped(one: Tensor, other: Tensor, *_: Any) -> int:
    """Count a grouped matmul, where each row or column is multiplied by the matrix of its group.

    Shapes are (T, k) by (G, k, m), (G, n, k) by (k, T), or (n, T) by (T, m), summed by group.
    """
    if one.dim() > other.dim():
        return 2 * other.numel() * one.shape[-2]
    return _product(one, other)


def _attention(query: Tensor, key: Tensor, *_: Any) -> int:
    """Count two matmuls over all pairs of tokens; a causal kernel may skip half of them."""
    return 4 * query.numel() * key.shape[-2]


def _varlen_attention(query: Tensor, key: Tensor, value: Tensor, ends: Tensor, *_: Any) -> int:
    """Count the same for concatenated documents (T, H, E), each with its own pairs."""
    pairs: int = sum(length**2 for length in ends.diff().tolist())
    return 4 * query.shape[1] * query.shape[2] * pairs


_WORK: dict[str, Callable[..., int]] = {
    "aten::mm": _product,
    "aten::bmm": _product,
    "aten::_int_mm": _product,
    "aten::_grouped_mm": _grouped,
    **dict.fromkeys(
        ("aten::addmm", "aten::addmm_", "aten::baddbmm", "aten::baddbmm_"),
        lambda _, one, other, *__: _product(one, other),
    ),
    "aten::_scaled_dot_product_flash_attention_for_cpu": _attention,
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": lambda _, query, key, *__: (
        5 * _attention(query, key) // 2
    ),
    "torch_attn::_varlen_attn": _varlen_attention,
    "torch_attn::_varlen_attn_backward": lambda _, query, key, value, output, sums, ends, *__: (
        5 * _varlen_attention(query, key, value, ends) // 2
    ),
}
"""Floating-point operations of the expensive operations."""

_decompose = cache(decompose)
